"""The named data sets: found in a data folder, else downloaded from their authors, and verified."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
import sklearn.datasets
import sklearn.model_selection

from experiments.datasets.archives import check_content, check_file, read_file, read_tar
from experiments.datasets.dataset import Dataset, make_dataset
from experiments.datasets.formats import parse_cifar, parse_idx, read_svhn

_DIGITS = tuple("0123456789")
_NOISE_SHARE = 0.2
_NOISE_SEED = 0
_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


class RemoteFile(NamedTuple):
    """A published file and the checksum of its bytes, "md5:..." or "sha1:..."."""

    url: str
    checksum: str

    @property
    def name(self) -> str:
        """File name, the last part of the URL."""
        return self.url.rsplit("/", 1)[1]


class MnistFile(NamedTuple):
    """A published gzip file, the checksum of its uncompressed content, and the array's rank."""

    remote: RemoteFile
    content_checksum: str
    ndim: int


class CifarFile(NamedTuple):
    """How many records a binary file in the archive holds, and the checksum of its content."""

    num_records: int
    checksum: str


class CifarFiles(NamedTuple):
    """A published archive and the binary files in it that matter."""

    archive: RemoteFile
    train: dict[str, CifarFile]
    test: dict[str, CifarFile]
    label_bytes: int
    class_names: tuple[str, ...]


def _mnist_file(name: str, checksum: str, content_checksum: str, ndim: int) -> MnistFile:
    url = f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz"
    return MnistFile(RemoteFile(url, checksum), content_checksum, ndim)


MNIST = (
    _mnist_file(
        "train-images-idx3-ubyte",
        checksum="md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        content_checksum="md5:6bbc9ace898e44ae57da46a324031adb",
        ndim=3,
    ),
    _mnist_file(
        "train-labels-idx1-ubyte",
        checksum="md5:d53e105ee54ea40749a09fcbcd1e9432",
        content_checksum="md5:a25bea736e30d166cdddb491f175f624",
        ndim=1,
    ),
    _mnist_file(
        "t10k-images-idx3-ubyte",
        checksum="md5:9fb629c4189551a2d022fa330f9573f3",
        content_checksum="md5:2646ac647ad5339dbf082846283269ea",
        ndim=3,
    ),
    _mnist_file(
        "t10k-labels-idx1-ubyte",
        checksum="md5:ec29112dd5afa0611ce80d1b7f02629c",
        content_checksum="md5:27ae3e4e09519cfbb04c329615203637",
        ndim=1,
    ),
)

# The archives' checksums are their authors'; those of the files in them are MXNet Gluon's.
CIFAR10 = CifarFiles(
    archive=RemoteFile(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        checksum="md5:c32a1d4ab5d03f1284b67883e8d87530",
    ),
    train={
        "data_batch_1.bin": CifarFile(10_000, "sha1:aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
        "data_batch_2.bin": CifarFile(10_000, "sha1:c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
        "data_batch_3.bin": CifarFile(10_000, "sha1:1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
        "data_batch_4.bin": CifarFile(10_000, "sha1:aab85764eb3584312d3c7f65fd2fd016e36a258e"),
        "data_batch_5.bin": CifarFile(10_000, "sha1:26e2849e66a845b7f1e4614ae70f4889ae604628"),
    },
    test={"test_batch.bin": CifarFile(10_000, "sha1:67eb016db431130d61cd03c7ad570b013799c88c")},
    label_bytes=1,
    class_names=tuple(_CIFAR10_CLASSES.split()),
)

CIFAR100 = CifarFiles(
    archive=RemoteFile(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        checksum="md5:03b5dce01913d631647c71ecec9e9cb8",
    ),
    train={"train.bin": CifarFile(50_000, "sha1:e207cd2e05b73b1393c74c7f5e7bea451d63e08e")},
    test={"test.bin": CifarFile(10_000, "sha1:8fb6623e830365ff53cf14adec797474f5478006")},
    label_bytes=2,
    class_names=tuple(_CIFAR100_CLASSES.split()),
)

SVHN = (
    RemoteFile(
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        checksum="md5:e26dedcc434d2e4c54c9b2d4a06d8373",
    ),
    RemoteFile(
        "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        checksum="md5:eb5a983be6a315427106f1b164d9cef3",
    ),
)


def load_digits(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The 1,797 8x8 digits that ship with scikit-learn, pixels 0..16, 360 of them for testing."""
    del data_dir, cache_dir
    bunch = sklearn.datasets.load_digits()
    images = bunch.images[..., None].astype(np.uint8)
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, bunch.target, test_size=360, random_state=0, stratify=bunch.target
    )
    return make_dataset("digits", (train_images, train_labels), (test_images, test_labels), _DIGITS)


def load_digits_noisy(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """The digits with 20 % of the training labels wrong, so that no model can fit F* = 0.

    287 of the 1,437 training examples, drawn without replacement, have their label replaced by one
    of the other nine, each as likely. The draw is always the same: it takes the raw 64-bit numbers
    of PCG64, which NumPy keeps the same in all versions. Test labels are those of the digits.
    """
    digits = load_digits(data_dir, cache_dir)
    labels = digits.train["label"].copy()
    order, shifts = np.random.PCG64(_NOISE_SEED).random_raw((2, len(labels)))
    wrong = np.argsort(order)[: round(_NOISE_SHARE * len(labels))]
    others = digits.num_classes - 1
    shift = 1 + (shifts[wrong] % others).astype(np.int32)
    labels[wrong] = (labels[wrong] + shift) % digits.num_classes
    return digits._replace(name="digits_noisy", train=digits.train | {"label": labels})


def load_mnist(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """MNIST from four IDX files, plain or compressed, whose content is verified."""
    arrays = []
    for file in MNIST:
        names = (file.remote.name, file.remote.name.removesuffix(".gz"))
        path = _find("mnist", names, data_dir) or _download(
            "mnist", file.remote, tuple(f.remote for f in MNIST), data_dir, cache_dir
        )
        content = read_file(path)
        check_content(content, path, file.content_checksum)
        arrays.append(parse_idx(content, str(path), file.ndim))
    train_images, train_labels, test_images, test_labels = arrays
    return make_dataset(
        "mnist",
        (train_images[..., None], train_labels),
        (test_images[..., None], test_labels),
        _DIGITS,
    )


def load_cifar10(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """CIFAR-10, binary version."""
    return _load_cifar("cifar10", CIFAR10, data_dir, cache_dir)


def load_cifar100(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """CIFAR-100, binary version, with its 100 fine labels."""
    return _load_cifar("cifar100", CIFAR100, data_dir, cache_dir)


def load_svhn(data_dir: Path | None, cache_dir: Path) -> Dataset:
    """SVHN's cropped 32x32 digits, without the extra images."""
    train, test = (_load_svhn_split(remote, data_dir, cache_dir) for remote in SVHN)
    return make_dataset("svhn", train, test, _DIGITS)


def _load_svhn_split(
    remote: RemoteFile, data_dir: Path | None, cache_dir: Path
) -> tuple[np.ndarray, np.ndarray]:
    path = _find("svhn", (remote.name,), data_dir) or _download(
        "svhn", remote, SVHN, data_dir, cache_dir
    )
    check_file(path, remote.checksum)  # first: SciPy's reader can crash on a damaged file
    return read_svhn(path)


def _load_cifar(name: str, files: CifarFiles, data_dir: Path | None, cache_dir: Path) -> Dataset:
    contents = _read_cifar_files(name, files, data_dir, cache_dir)

    def split(parts: dict[str, CifarFile]) -> tuple[np.ndarray, np.ndarray]:
        parsed = []
        for file, part in parts.items():
            path, content = contents[file]
            parsed.append(parse_cifar(content, str(path), part.num_records, files.label_bytes))
        images, labels = zip(*parsed, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    return make_dataset(name, split(files.train), split(files.test), files.class_names)


def _read_cifar_files(
    name: str, files: CifarFiles, data_dir: Path | None, cache_dir: Path
) -> dict[str, tuple[Path, bytes]]:
    """Place and verified content of each file: found unpacked, else in the archive."""
    parts = files.train | files.test
    found = {file: path for file in parts if (path := _find(name, (file,), data_dir))}
    if found:
        where = f"{data_dir}/{name}"
        contents = {file: (path, read_file(path)) for file, path in found.items()}
    else:
        archive = _find(name, (files.archive.name,), data_dir) or _download(
            name, files.archive, (files.archive,), data_dir, cache_dir
        )
        check_file(archive, files.archive.checksum)
        where = str(archive)
        contents = {
            Path(member).name: (archive / member, content)
            for member, content in read_tar(archive)
            if Path(member).name in parts
        }
    if missing := sorted(parts.keys() - contents.keys()):
        raise FileNotFoundError(f"{where} holds no {', '.join(missing)}.")
    for file, (path, content) in contents.items():
        check_content(content, path, parts[file].checksum)
    return contents


def _find(dataset: str, names: tuple[str, ...], data_dir: Path | None) -> Path | None:
    """First of `names` in DATA_DIR/dataset, or in a folder therein as archives unpack to."""
    if data_dir is None:
        return None
    for pattern in ("{}", "*/{}"):
        for name in names:
            for path in sorted((data_dir / dataset).glob(pattern.format(name))):
                return path
    return None


def _download(
    dataset: str,
    file: RemoteFile,
    files: tuple[RemoteFile, ...],
    data_dir: Path | None,
    cache_dir: Path,
) -> Path:
    """Fetches `file` into CACHE_DIR/dataset unless it is there, verified either way."""
    try:
        return Path(
            pooch.retrieve(file.url, file.checksum, fname=file.name, path=cache_dir / dataset)
        )
    except OSError as error:
        place = f"{data_dir}/{dataset}" if data_dir else "a data folder (none was given)"
        urls = "\n  ".join(remote.url for remote in files)
        raise FileNotFoundError(
            f"{dataset} is not in {place} and could not be downloaded: {error}.\n"
            f"Get these files:\n  {urls}\nput them into DATA_DIR/{dataset}/ and pass "
            "--data-dir DATA_DIR or set CABS_JAX_DATA=DATA_DIR."
        ) from error
