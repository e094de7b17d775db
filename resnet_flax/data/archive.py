"""Reads the original archives of CIFAR-10 and CIFAR-100, in both layouts, in memory.

Source of the layouts: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import dataclasses
import hashlib
import os
import pathlib
import posixpath
import tarfile
import zlib
from typing import Any

import numpy as np

from resnet_flax.data import batch_pickle
from resnet_flax.errors import UserError

_SIDE = 32  # pixels
_PIXELS = 3 * _SIDE * _SIDE  # bytes of one image: all of red, then green, then blue, row by row
_LARGEST_MEMBER = 200_000_000  # bytes; the largest real one has 155 million.


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the archives in which the authors publish a data set.

    Attributes:
      file_name: under which it is published.
      size: bytes.
      sha256: hex.
      folder: in the archive, that holds all the files.
      train: names of the files of the training set, in order.
      test: names of the files of the test set.
      binary: whether the files are fixed-length records, or else pickles.
      labels: the labels of an example, in the order of the binary records: TFDS's name of each, its
        key in the pickles, and, of its names, the file of the binary and the key of the pickled
        layout.
      meta: the pickled file of the names.
    """

    file_name: str
    size: int
    sha256: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    binary: bool
    labels: tuple[tuple[str, str, str, str], ...]
    meta: str = ""


@dataclasses.dataclass(frozen=True)
class Content:
    """What an archive holds.

    Attributes:
      images: for each split, uint8 [N, 32, 32, 3], in the order of the archive.
      labels: for each split and name of a label in TFDS, uint8 [N].
      names: for each name of a label in TFDS, the names of the classes.
    """

    images: dict[str, np.ndarray]
    labels: dict[str, dict[str, np.ndarray]]
    names: dict[str, tuple[str, ...]]


_LABELS_10 = (("label", "labels", "batches.meta.txt", "label_names"),)
_LABELS_100 = (
    ("coarse_label", "coarse_labels", "coarse_label_names.txt", "coarse_label_names"),
    ("label", "fine_labels", "fine_label_names.txt", "fine_label_names"),
)

# Sizes and sums of the binary archives: TFDS's url_checksums; of the Python archives: the sizes
# torchvision downloads and the sums in Keras's loaders, of files whose md5 is torchvision's.
LAYOUTS = {
    "cifar10": (
        Layout(
            file_name="cifar-10-binary.tar.gz",
            size=170_052_171,
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            folder="cifar-10-batches-bin",
            train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test=("test_batch.bin",),
            binary=True,
            labels=_LABELS_10,
        ),
        Layout(
            file_name="cifar-10-python.tar.gz",
            size=170_498_071,
            sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            folder="cifar-10-batches-py",
            train=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test=("test_batch",),
            binary=False,
            labels=_LABELS_10,
            meta="batches.meta",
        ),
    ),
    "cifar100": (
        Layout(
            file_name="cifar-100-binary.tar.gz",
            size=168_513_733,
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            folder="cifar-100-binary",
            train=("train.bin",),
            test=("test.bin",),
            binary=True,
            labels=_LABELS_100,
        ),
        Layout(
            file_name="cifar-100-python.tar.gz",
            size=169_001_437,
            sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            folder="cifar-100-python",
            train=("train",),
            test=("test",),
            binary=False,
            labels=_LABELS_100,
            meta="meta",
        ),
    ),
}


def sha256_of(path: pathlib.Path) -> str:
    """Returns the sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify(
    path: str | os.PathLike,
    *,
    name: str,
    layouts: dict[str, tuple[Layout, ...]],
) -> tuple[pathlib.Path, Layout]:
    """Finds out by its checksum which archive a file is; its name does not matter.

    Args:
      path: of the archive.
      name: of the data set that it should hold.
      layouts: the known archives of every data set.

    Returns:
      The path, ~ expanded, and its layout.

    Raises:
      UserError: the file cannot be read, or is not one of the archives of that data set.
    """
    known = " or ".join(layout.file_name for layout in layouts[name])
    resolved = pathlib.Path(os.path.expanduser(path))
    try:
        digest, size = sha256_of(resolved), resolved.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read the archive {os.fspath(path)!r}: {error.strerror}") from error
    for other, candidates in layouts.items():
        for layout in candidates:
            if layout.sha256 == digest and other == name:
                return resolved, layout
            if layout.sha256 == digest:
                raise UserError(f"the archive {path} is {layout.file_name}; {name} needs {known}")
    sizes = " or ".join(f"{layout.size:,}" for layout in layouts[name])
    raise UserError(
        f"the archive {path} is not the published {known}: its sha256 is {digest}.\n"
        f"It has {size:,} bytes and should have {sizes}; download it again."
    )


def read(path: pathlib.Path, *, layout: Layout, sizes: dict[str, int]) -> Content:
    """Reads an archive; nothing is extracted to disk.

    Args:
      path: of the archive.
      layout: of the archive.
      sizes: the number of examples that each split must have.

    Returns:
      What it holds.

    Raises:
      UserError: the archive is truncated, or holds something else.
    """
    try:
        return _parse(_members(path, layout=layout), layout=layout, sizes=sizes)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UserError(
            f"the archive {path} is truncated, or not a {layout.file_name}: {error}"
        ) from error


def _members(path: pathlib.Path, *, layout: Layout) -> dict[str, bytes]:
    """Returns the content of the files of the layout; all others are skipped."""
    names = {*layout.train, *layout.test}
    names |= {label[2] for label in layout.labels} if layout.binary else {layout.meta}
    wanted = {posixpath.join(layout.folder, name): name for name in names}
    found = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = wanted.get(posixpath.normpath(member.name))
            if name is None or not member.isfile():
                continue
            if member.size > _LARGEST_MEMBER:
                raise ValueError(f"{member.name} has {member.size:,} bytes")
            with tar.extractfile(member) as file:
                found[name] = file.read()
    missing = sorted(names - found.keys())
    if missing:
        raise ValueError(f"it has no {layout.folder}/{missing[0]}")
    return found


def _parse(members: dict[str, bytes], *, layout: Layout, sizes: dict[str, int]) -> Content:
    """Makes arrays of the files of an archive."""
    keys = [label[0] for label in layout.labels]
    if layout.binary:
        names = [members[label[2]].decode().split("\n") for label in layout.labels]
    else:
        meta = batch_pickle.read(members[layout.meta])
        names = [_texts(_item(meta, label[3])) for label in layout.labels]
    names = {
        key: tuple(n.strip() for n in ns if n.strip()) for key, ns in zip(keys, names, strict=True)
    }
    images, labels = {}, {}
    for split, files in (("train", layout.train), ("test", layout.test)):
        batches = [_batch(members[file], layout=layout) for file in files]
        pixels = np.concatenate([batch[0] for batch in batches])
        numbers = np.concatenate([batch[1] for batch in batches], axis=1)
        if len(pixels) != sizes[split]:
            raise ValueError(f"its {split} set has {len(pixels)} examples, not {sizes[split]}")
        for key, values in zip(keys, numbers, strict=True):
            if values.max() >= len(names[key]):
                raise ValueError(f"it has the {key} {values.max()} and {len(names[key])} names")
        images[split] = np.ascontiguousarray(
            pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        )
        labels[split] = dict(zip(keys, numbers, strict=True))
    return Content(images=images, labels=labels, names=names)


def _batch(data: bytes, *, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels, uint8 [N, 3072], and labels, uint8 [labels per example, N], of one file."""
    count = len(layout.labels)
    if layout.binary:
        if not data or len(data) % (count + _PIXELS):
            raise ValueError(f"a file of {len(data)} bytes is not made of {count + _PIXELS} each")
        records = np.frombuffer(data, np.uint8).reshape(-1, count + _PIXELS)
        return records[:, count:], records[:, :count].T
    batch = batch_pickle.read(data)
    pixels = _item(batch, "data")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise ValueError(f"its images are not an array of {_PIXELS} columns")
    labels = [_item(batch, label[1]) for label in layout.labels]
    for values in labels:
        if not isinstance(values, list) or len(values) != len(pixels):
            raise ValueError("its labels are not a list of one for each image")
        if not all(type(value) is int and 0 <= value < 256 for value in values):
            raise ValueError("its labels are not small numbers")
    return pixels, np.array(labels, np.uint8)


def _item(batch: dict[str, Any], key: str) -> Any:
    """Returns a value of a batch."""
    if key not in batch:
        raise ValueError(f"it has no {key!r}")
    return batch[key]


def _texts(names: Any) -> list[str]:
    """Returns the names of classes as str; Python 2 wrote bytes."""
    if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
        raise ValueError("its names of classes are not a list of strings")
    return [name.decode() if isinstance(name, bytes) else name for name in names]
