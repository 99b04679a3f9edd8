"""What every data set looks like once loaded, and the checks it has passed."""

import hashlib
from typing import NamedTuple

import numpy as np

MAX_DATASET_BYTES = 8 << 30


class Dataset(NamedTuple):
    """Labelled images of one size, split into training and test examples.

    Attributes:
      name: Name for reports.
      train: Training examples: "image", uint8 (n, height, width, channels), and "label", int32
        (n,), both C-contiguous, perhaps read-only.
      test: Test examples, likewise.
      class_names: Name of each class, in the order of the labels.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes; labels lie in [0, num_classes)."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        _, height, width, channels = self.train["image"].shape
        return height, width, channels


def make_dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: tuple[str, ...],
) -> Dataset:
    """Puts (images, labels) pairs into a `Dataset`.

    Raises:
      ValueError: If images are not uint8 (n, height, width, channels), a split is empty, images and
        labels differ in number, a label has no class, or the splits differ in image shape.
    """
    splits = {}
    for split, (images, labels) in {"train": train, "test": test}.items():
        where = f"{name}, {split} split"
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{where}: images must be uint8 (n, height, width, channels), "
                f"got {images.dtype} {images.shape}."
            )
        if images.size == 0:
            raise ValueError(f"{where}: holds no pixels, its images have shape {images.shape}.")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{where}: {len(images)} images but labels of shape {labels.shape}.")
        if labels.min() < 0 or labels.max() >= len(class_names):
            wrong = labels[(labels < 0) | (labels >= len(class_names))][0]
            raise ValueError(f"{where}: label {wrong} is outside [0, {len(class_names)}).")
        splits[split] = {
            "image": np.ascontiguousarray(images),
            "label": np.ascontiguousarray(labels, np.int32),
        }
    shapes = [splits[split]["image"].shape[1:] for split in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: training images are {shapes[0]}, test images {shapes[1]}.")
    return Dataset(name, splits["train"], splits["test"], class_names)


def fingerprint(dataset: Dataset) -> str:
    """Hash of the examples and class names: equal for equal data, wherever it was loaded from."""
    digest = hashlib.blake2b(repr(dataset.class_names).encode(), digest_size=16)
    for split in (dataset.train, dataset.test):
        for array in (split["image"], split["label"]):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(array.data)
    return digest.hexdigest()
