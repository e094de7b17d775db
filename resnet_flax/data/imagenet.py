"""ImageNet (ILSVRC 2012, TFDS's imagenet2012): read where it is prepared, or else prepared.

The images are far too many for memory: they are read one at a time, encoded, from any of many
processes.
"""

import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from resnet_flax.data import imagenet_archive, prepare, prepared
from resnet_flax.errors import UserError

NAME = "imagenet2012"
VERSION = "5.1.0"  # in TFDS
SIZES = {"train": 1_281_167, "validation": 50_000}
CLASSES = 1000
_CHUNK = 1000  # examples read at a time


class Source:
    """The images of one split, encoded, and their labels; in the order of TFDS.

    It can be pickled, and then holds no more than a path; each process opens the files by itself
    when it first reads.
    """

    def __init__(self, directory: pathlib.Path, *, split: str, size: int):
        """Names the source; nothing is opened.

        Args:
          directory: of the prepared version.
          split: as TFDS calls it.
          size: the number of its examples.
        """
        self._directory = directory
        self._split = split
        self._size = size
        self._opened = None
        self._labels = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_labels": None}

    def __len__(self) -> int:
        return self._size

    def labels(self) -> np.ndarray:
        """Returns all labels, int32 [N].

        They lie among the images, so that the first call reads the whole split, without decoding
        it: of the training set, 140 GB.

        Raises:
          UserError: a file cannot be read, or holds other labels than 0..999.
        """
        if self._labels is None:
            labels = np.empty(self._size, np.int32)
            try:
                for start in range(0, self._size, _CHUNK):
                    indices = range(start, min(start + _CHUNK, self._size))
                    for index, example in zip(indices, self._examples(indices), strict=True):
                        labels[index] = self._label(example)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"cannot read the labels of {self._split!r} in {self._directory}: {error}\n"
                    f"Delete that folder to have {NAME} prepared again, or give another data_dir."
                ) from error
            self._labels = labels
        return self._labels

    def read(self, index: int) -> tuple[bytes, int]:
        """Returns an image, encoded, and its label.

        Raises:
          OSError, ValueError: it cannot be read, or has no label in 0..999.
        """
        (example,) = self._examples([index])
        return example["image"], self._label(example)

    def name(self, index: int) -> str:
        """Returns what an example is called in messages: its file's name and its place."""
        place = f"example {index} of {self._split!r} in {self._directory}"
        try:
            (example,) = self._examples([index])
            return f"{example['file_name'].decode()} ({place})"
        except (OSError, KeyError, ValueError, AttributeError):
            return place

    def _examples(self, indices: range | list[int]) -> list[dict[str, Any]]:
        """Reads examples, images undecoded."""
        for index in indices:
            if not 0 <= index < self._size:
                raise IndexError(f"{index} of {self._size} examples")
        try:
            if self._opened is None:
                self._opened = _open(self._directory, split=self._split)
            return self._opened.__getitems__([int(index) for index in indices])
        except Exception as error:  # array_record raises many kinds.
            raise OSError(prepared.first_line(error)) from error

    def _label(self, example: dict[str, Any]) -> int:
        """Returns the label of an example."""
        label = int(example["label"])
        if not 0 <= label < CLASSES:
            raise ValueError(f"there is the label {label}; those of {NAME} are 0..{CLASSES - 1}")
        return label


def load(
    *, data_dir: str | os.PathLike | None, archives: str | os.PathLike | None, show_progress: bool
) -> tuple[Source, Source, tuple[str, ...], str]:
    """Opens ImageNet, preparing it first where that has not been done.

    Args:
      data_dir: folder of prepared data sets; None or "" for the environment variable TFDS_DATA_DIR,
        or else ~/tensorflow_datasets.
      archives: folder of ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or None or "" for
        downloads/manual in `data_dir`, where TFDS looks for them. Not looked at where the data are
        prepared already.
      show_progress: whether to say on stderr what takes long.

    Returns:
      The training set; the validation set, which is what everybody tests on; the synset of each
      label; and the sha256 (hex) of the name, the version and the lengths of the files, which
      differs where the data were prepared by another program.

    Raises:
      UserError: there are neither prepared data nor archives, or they are damaged, or cannot be
        written.
    """
    root = prepared.resolve_data_dir(data_dir)
    directory = prepared.find(NAME, data_dir=root, version=VERSION)
    if directory is None:
        directory = make(data_dir=root, archives=archives, show_progress=show_progress)
    info = prepared.open_builder(NAME, directory=directory, sizes=SIZES).info
    names = tuple(info.features["label"].names)
    if len(names) != CLASSES:
        raise UserError(f"{directory} has {len(names)} classes; {NAME} has {CLASSES}")
    paths = [path for split in SIZES for path in info.splits[split].filepaths]
    absent = [path for path in paths if not os.path.exists(path)]
    if absent and info.file_format.value == prepared.READABLE_FORMAT:
        raise UserError(
            f"{len(absent)} of the {len(paths)} files of {directory} are not there, such as "
            f"{os.path.basename(absent[0])}; copy them there, or delete that folder to have {NAME} "
            "prepared again, or give another data_dir"
        )
    content = {
        "name": NAME,
        "version": str(info.version),
        "splits": {
            split: [list(info.splits[split].shard_lengths), int(info.splits[split].num_bytes)]
            for split in SIZES
        },
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    train, test = (Source(directory, split=split, size=size) for split, size in SIZES.items())
    return train, test, names, fingerprint


def make(
    *, data_dir: pathlib.Path, archives: str | os.PathLike | None, show_progress: bool
) -> pathlib.Path:
    """Prepares ImageNet from its two archives; the arguments are those of `load`.

    Takes as much disk as the archives do, besides them.

    Returns:
      The folder of the prepared version.

    Raises:
      UserError: the archives are not there or not what they should be, or the result cannot be
        written.
    """
    prepare.refuse_occupied(NAME, data_dir=data_dir, version=VERSION)
    manual = data_dir / "downloads" / "manual"
    files = imagenet_archive.FILES
    if not archives and not any((manual / file).is_file() for file in files.values()):
        raise UserError(
            f"there is no prepared {NAME} in {data_dir}. Download {' and '.join(files.values())} "
            "from https://image-net.org (which needs an account), and give their folder with "
            "--config.data.archive=FOLDER.\nWhere the data are prepared already, give "
            "--config.data.data_dir=FOLDER."
        )
    paths = imagenet_archive.find(archives or manual)
    with prepare.exclusive(data_dir, name=NAME, show_progress=show_progress) as staging:
        # Another process may have prepared it while this one waited.
        directory = prepared.find(NAME, data_dir=data_dir, version=VERSION)
        if directory is not None:
            return directory
        if show_progress:
            print(f"Preparing {NAME} in {data_dir} (once; an hour or so)", file=sys.stderr)
        synsets = _lines("labels.txt")
        numbers = {synset: label for label, synset in enumerate(synsets)}
        found = {
            "train": imagenet_archive.index_train(
                paths["train"], synsets=synsets, size=SIZES["train"], show_progress=show_progress
            ),
            "validation": imagenet_archive.index_validation(
                paths["validation"],
                labels=tuple(numbers[synset] for synset in _lines("validation_labels.txt")),
            ),
        }
        return prepare.prepare(
            NAME,
            splits={split: _examples(archive) for split, archive in found.items()},
            names={},
            data_dir=data_dir,
            staging=staging,
            show_progress=show_progress,
        )


def _examples(archive: imagenet_archive.Archive) -> prepare.Examples:
    """Returns the examples of a split as TFDS has them."""

    def read(index: int) -> dict[str, Any]:
        member = archive.members[index]
        return {"image": archive.read(index), "label": member.label, "file_name": member.name}

    return prepare.Examples(
        keys=[member.name for member in archive.members],
        read=read,
        size=sum(member.size for member in archive.members),
    )


def _lines(file: str) -> tuple[str, ...]:
    """Returns the lines of one of the files that TFDS has for this data set."""
    import tensorflow_datasets as tfds

    return tuple(tfds.core.tfds_path(f"datasets/{NAME}/{file}").read_text().split())


def _open(directory: pathlib.Path, *, split: str) -> Any:
    """Returns TFDS's own random-access source of a split, images undecoded."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory).as_data_source(
        split=split,
        decoders={"image": tfds.decode.SkipDecoding()},
        file_format=prepared.READABLE_FORMAT,
    )
