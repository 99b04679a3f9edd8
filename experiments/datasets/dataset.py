"""What every data set looks like once loaded, and the checks it has passed."""

import hashlib
from typing import NamedTuple

import numpy as np

MAX_DATASET_BYTES = 8 << 30


class Dataset(NamedTuple):
    """Labelled images of one size or bytes and what follows them, for training and for tests.

    Attributes:
      name: Name for reports.
      train: Training examples: "input", uint8 (n, height, width, channels), and "label", int32
        (n,), or, of text, both (n, length). They are C-contiguous, perhaps read-only.
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
    def input_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of every image, (length,) of every sequence of bytes."""
        shape: tuple[int, ...] = self.train["input"].shape
        return shape[1:]


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
            "input": np.ascontiguousarray(images),
            "label": np.ascontiguousarray(labels, np.int32),
        }
    shapes = [splits[split]["input"].shape[1:] for split in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: training images are {shapes[0]}, test images {shapes[1]}.")
    return Dataset(name, splits["train"], splits["test"], class_names)


def make_sequences(
    name: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
) -> Dataset:
    """A `Dataset` of bytes, uint8 (n, length), and of the byte that follows each of them."""

    def split(codes: np.ndarray, following: np.ndarray) -> dict[str, np.ndarray]:
        labels = np.ascontiguousarray(following, np.int32)
        return {"input": np.ascontiguousarray(codes), "label": labels}

    return Dataset(name, split(*train), split(*test), tuple(map(str, range(256))))


def fingerprint(dataset: Dataset) -> str:
    """Hash of the examples and class names: equal for equal data, wherever it was loaded from."""
    digest = hashlib.blake2b(repr(dataset.class_names).encode(), digest_size=16)
    for split in (dataset.train, dataset.test):
        for array in (split["input"], split["label"]):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(array.data)
    return digest.hexdigest()
