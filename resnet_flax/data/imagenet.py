"""ImageNet (ILSVRC 2012): read where TFDS has prepared it, or else from its two archives in place.

The images are far too many for memory: they are read one at a time, from any of many processes.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator

import numpy as np

from resnet_flax.data import dataset, decoded, streaming, tfds_files
from resnet_flax.data.streaming import Source
from resnet_flax.errors import UserError, first_line

NAME = "imagenet2012"
VERSION = "5.1.0"  # in TFDS
SIZES = {"train": 1_281_167, "validation": 50_000}
CLASSES = 1000
# In the training archive lies a tar for each class.
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
_PUBLISHED_BYTES = {"train": 147_897_477_120, "validation": 6_744_924_160}  # TFDS's checksums.tsv


def load(
    data_dir: str | os.PathLike | None,
    archives: str | os.PathLike | None,
    geometry: streaming.Geometry | None,
) -> dataset.Dataset:
    """Opens ImageNet where TFDS has prepared it, or else its two archives.

    `data_dir` is as in `tfds_files.resolve_data_dir`. The archives are in the directory `archives`
    or, where it is None or "", in downloads/manual of `data_dir`, where TFDS looks for them.

    The test set is the validation set, as everywhere in the literature, and the class names are
    synsets. The fingerprint covers what identifies the images without reading them: the lengths of
    TFDS's files, or the names, sizes and labels of the images in the archives.

    Raises:
      UserError: there are neither prepared data nor archives, or they are damaged.
    """
    root = tfds_files.resolve_data_dir(data_dir)
    directory = tfds_files.find(NAME, data_dir=root, version=VERSION)
    found = _open_archives(root, archives) if directory is None else _open_prepared(directory)
    (train, test), synsets, fingerprint = found
    train = streaming.whole(train, geometry, central=False)
    test = streaming.whole(test, geometry, central=True)
    return dataset.Dataset(NAME, train, None, test, synsets, fingerprint)


# Both return a source for each of `SIZES`, the synset of each label, and the fingerprint.
def _open_archives(
    root: pathlib.Path, archives: str | os.PathLike | None
) -> tuple[list[Source], tuple[str, ...], str]:
    folder = pathlib.Path(os.path.expanduser(archives or root / "downloads" / "manual"))
    absent = [file for file in ARCHIVES.values() if not (folder / file).is_file()]
    if absent:
        raise UserError(
            f"there is no prepared {NAME} in {root} and no {absent[0]} in {folder}.\nSet "
            f"config.data.archive to the directory of {' and '.join(ARCHIVES.values())}, from "
            "https://image-net.org, or config.data.data_dir to where TFDS has prepared them."
        )
    synsets = _tfds_lines("labels.txt")
    sources, digest = [], hashlib.sha256()
    for split, file in ARCHIVES.items():
        make_index = functools.partial(_index, split, folder / file, synsets)
        index = decoded.read(f"{NAME}-{split}", folder / file, make_index)
        digest.update(index["digest"])
        arrays = index["offsets"], index["sizes"], index["classes"]
        sources.append(ArchiveSource(folder / file, *arrays))
    return sources, synsets, digest.hexdigest()


class PreparedSource(tfds_files.Examples):
    """A split that TFDS has prepared: a `streaming.Source`."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N]; they lie among the images, 140 GB of which are read for the training set."""
        try:
            return np.fromiter((example["label"] for example in self), np.int32, len(self))
        except OSError as error:
            raise UserError(
                f"cannot read the labels of {self.split!r} in {self.directory}: {error}\n"
                "Copy that directory again, or give another config.data.data_dir."
            ) from error

    def read(self, index: int) -> tuple[bytes, int]:  # noqa: D102
        example = self[index]
        return example["image"], int(example["label"])

    def name(self, index: int) -> str:  # noqa: D102
        position = f"example {index} of {self.split!r} in {self.directory}"
        try:
            return f"{self[index]['file_name'].decode()} ({position})"
        except OSError:
            return position


def _open_prepared(directory: pathlib.Path) -> tuple[list[Source], tuple[str, ...], str]:
    info = tfds_files.read_info(NAME, directory=directory, sizes=SIZES, classes=CLASSES)
    paths = [path for split in SIZES for path in info.splits[split].filepaths]
    absent = [path for path in paths if not os.path.exists(path)]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(paths)} files of {directory} are not there, such as "
            f"{os.path.basename(absent[0])}; copy them there, or give another config.data.data_dir"
        )
    splits = {
        split: [list(info.splits[split].shard_lengths), int(info.splits[split].num_bytes)]
        for split in SIZES
    }
    content = {"name": NAME, "version": str(info.version), "splits": splits}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    sources = [PreparedSource(directory, split) for split in SIZES]
    return sources, tuple(info.features["label"].names), fingerprint


@dataclasses.dataclass(frozen=True)
class ArchiveSource:
    """The images in the archive `path`, in the order of TFDS: a `streaming.Source`."""

    path: pathlib.Path
    offsets: np.ndarray  # int64 [N], where each image begins, in bytes
    sizes: np.ndarray  # int64 [N], in bytes
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> tuple[bytes, int]:  # noqa: D102
        content = self._bytes(self.offsets[index], self.sizes[index])
        if len(content) != self.sizes[index]:
            raise OSError(f"{self.path} ends within the image")
        return content, int(self.labels[index])

    def name(self, index: int) -> str:
        """The image's file name, which the block of the archive before the image holds."""
        try:
            block = self._bytes(self.offsets[index] - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "replace").name
        except (OSError, tarfile.HeaderError):
            name = f"example {index}"
        return f"{name} in {self.path}"

    def _bytes(self, offset: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)


def _index(split: str, path: pathlib.Path, synsets: tuple[str, ...]) -> decoded.Arrays:
    """The arrays of an `ArchiveSource` and their digest, uint8 [32]."""
    labels = {synset: label for label, synset in enumerate(synsets)}
    if split == "validation":
        labels = {
            f"ILSVRC2012_val_{number:08d}.JPEG": labels[synset]
            for number, synset in enumerate(_tfds_lines("validation_labels.txt"), 1)
        }
    images = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for name, offset, size in _files(tar, split):
                key = name.partition("_")[0] if split == "train" else name
                if key not in labels or name in images:
                    raise tarfile.ReadError(f"{name} does not belong there, or is there twice")
                images[name] = offset, size, labels[key]
        if len(images) != SIZES[split]:
            raise tarfile.ReadError(f"it has {len(images):,} images, not {SIZES[split]:,}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"the archive {path} is truncated, or not {ARCHIVES[split]}: {first_line(error)}\n"
            f"It has {path.stat().st_size:,} bytes, the published one "
            f"{_PUBLISHED_BYTES[split]:,}; download it again."
        ) from error
    order = sorted(images, key=lambda name: hashlib.md5(f"{split}{name}".encode()).digest())
    offsets, sizes, classes = np.array([images[name] for name in order], np.int64).T
    digest = hashlib.sha256(split.encode())
    for name in order:
        _, size, label = images[name]
        digest.update(f"{name} {size} {label}\n".encode())
    return {
        "offsets": offsets,
        "sizes": sizes,
        "classes": classes.astype(np.int32),
        "digest": np.frombuffer(digest.digest(), np.uint8),
    }


def _files(tar: tarfile.TarFile, split: str) -> Iterator[tuple[str, int, int]]:
    """Yields the name of each image, where it begins in the archive, and its size, in bytes."""
    from tqdm import tqdm

    files = (member for member in tar if member.isfile())
    if split == "validation":
        yield from ((posixpath.basename(f.name), f.offset_data, f.size) for f in files)
        return
    # disable=None: shown where stderr is a terminal.
    for outer in tqdm(files, "Indexing ImageNet", CLASSES, unit=" classes", disable=None):
        try:
            with tarfile.open(fileobj=tar.extractfile(outer), mode="r:") as inner:
                for file in inner:
                    offset = outer.offset_data + file.offset_data
                    yield posixpath.basename(file.name), offset, file.size
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"{outer.name} in it: {error}") from error


def _tfds_lines(file: str) -> tuple[str, ...]:
    import tensorflow_datasets as tfds

    return tuple(tfds.core.tfds_path(f"datasets/{NAME}/{file}").read_text().split())
