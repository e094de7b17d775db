"""The original archives of CIFAR-10 and CIFAR-100, read in memory.

Their authors describe both layouts: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import io
import os
import pathlib
import pickle
import posixpath
import tarfile
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.errors import UserError, first_line

_SHAPE = (3, 32, 32)  # of an image: all of red, then green, then blue, row by row


class Layout(NamedTuple):
    """The files of a data set's archives; in the binary archive, `files` end in .bin."""

    files: dict[str, tuple[str, ...]]  # of each split, in order
    names_file: str  # in the Python archive, the pickled class names
    labels: dict[str, str]  # in the order of the binary records: name in the archive and in TFDS


class Content(NamedTuple):
    """What an archive holds, in its order."""

    images: dict[str, np.ndarray]  # of each split, uint8 [N, 32, 32, 3]
    labels: dict[str, dict[str, np.ndarray]]  # of each split and TFDS's label, integers [N]
    class_names: dict[str, tuple[str, ...]]  # of each of TFDS's labels


# Of the binary archives TFDS's url_checksums; of the Python archives the sums in Keras, for files
# that have the md5 of torchvision's.
ARCHIVES = {
    "cifar10": {
        "cifar-10-binary": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-python": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    },
    "cifar100": {
        "cifar-100-binary": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-python": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    },
}
"""SHA-256 (hex) of each data set's published archives; the names of their files add .tar.gz."""

_LAYOUTS = {
    "cifar10": Layout(
        files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        names_file="batches.meta",
        labels={"label": "label"},
    ),
    "cifar100": Layout(
        files={"train": ("train",), "test": ("test",)},
        names_file="meta",
        labels={"coarse_label": "coarse_label", "fine_label": "label"},
    ),
}


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str | os.PathLike, name: str) -> Content:
    """Reads an archive of a data set, known by its SHA-256 whatever its file name.

    Nothing is extracted to disk, and nothing in a pickle is executed.

    Raises:
      UserError: the file cannot be read, or is not one of the data set's archives.
    """
    resolved = pathlib.Path(os.path.expanduser(path))
    try:
        digest = sha256_of(resolved)
    except OSError as error:
        raise UserError(f"cannot read the archive {os.fspath(path)!r}: {error.strerror}") from error
    if digest not in ARCHIVES[name].values():
        known = " or ".join(f"{stem}.tar.gz" for stem in ARCHIVES[name])
        found = [stem for sums in ARCHIVES.values() for stem in sums if sums[stem] == digest]
        problem = f"is {found[0]}.tar.gz" if found else f"is damaged, or another file ({digest=})"
        raise UserError(f"the archive {path} {problem}; {name} needs the published {known}")
    try:
        with tarfile.open(resolved, "r:gz") as tar:
            files = {
                posixpath.basename(member.name): tar.extractfile(member).read()
                for member in tar
                if member.isfile()
            }
        return _parse(files, _LAYOUTS[name])
    except Exception as error:  # Damaged files make the parsers raise anything.
        raise UserError(f"cannot read the archive {path}: {first_line(error)}") from error


def _parse(files: dict[str, bytes], layout: Layout) -> Content:
    read_files = _read_python if layout.names_file in files else _read_binary
    names, splits = read_files(files, layout)
    keys = layout.labels.values()
    return Content(
        {s: pixels.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1) for s, (pixels, _) in splits.items()},
        {split: dict(zip(keys, labels, strict=True)) for split, (_, labels) in splits.items()},
        {key: tuple(filter(None, found)) for key, found in zip(keys, names, strict=True)},
    )


# Both return the class names of each label and, of each split, pixels [N, 3072] and labels [n, N].
def _read_binary(files: dict[str, bytes], layout: Layout) -> tuple[list, dict[str, tuple]]:
    texts = [files.get("batches.meta.txt") or files[f"{n}_names.txt"] for n in layout.labels]
    splits, count = {}, len(layout.labels)
    for split, members in layout.files.items():
        data = b"".join(files[f"{member}.bin"] for member in members)
        records = np.frombuffer(data, np.uint8).reshape(-1, count + np.prod(_SHAPE))
        splits[split] = records[:, count:], records[:, :count].T
    return [text.decode().split("\n") for text in texts], splits


def _read_python(files: dict[str, bytes], layout: Layout) -> tuple[list, dict[str, tuple]]:
    meta, splits = _unpickle(files[layout.names_file]), {}
    for split, members in layout.files.items():
        batches = [_unpickle(files[member]) for member in members]
        splits[split] = (
            np.concatenate([batch["data"].values for batch in batches]),
            [np.concatenate([batch[f"{n}s"] for batch in batches]) for n in layout.labels],
        )
    return [[name.decode() for name in meta[f"{n}_names"]] for n in layout.labels], splits


def _unpickle(data: bytes) -> dict[str, Any]:
    batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    return {key.decode() if isinstance(key, bytes) else key: batch[key] for key in batch}


class _Array:
    """Stands in for a numpy array: the real one trusts the shape and type that a file gives it."""

    def __init__(self, *ignored: Any):
        self.values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        if dtype.name not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it has an array of {dtype.name!r}, not of 'u1'")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="CF"[by_columns])


class _Dtype:
    """Stands in for a numpy dtype, whose state could make memory be read as objects."""

    def __init__(self, name: bytes | str, *ignored: Any):
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        """Ignores byte order and alignment, which single bytes do not have."""


class _Unpickler(pickle.Unpickler):
    """Reads numbers, text, lists, dicts and arrays of bytes; runs nothing that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}'") from None


_STAND_INS = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": str.encode,  # how Python 3 writes bytes in protocols 0 to 2
}
