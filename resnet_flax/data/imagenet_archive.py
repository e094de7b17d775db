"""Reads ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in place; nothing is extracted.

The first holds one tar for each class, named after its synset, of files such as
n01440764_10026.JPEG; the second holds ILSVRC2012_val_00000001.JPEG and so on. Where each image lies
is found out first, by reading the headers, so that what is wrong with an archive is said before
anything is written, and images can then be read in any order.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator

from resnet_flax.data import images
from resnet_flax.errors import UserError

FILES = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
PUBLISHED_BYTES = {"train": 147_897_477_120, "validation": 6_744_924_160}  # TFDS's checksums.tsv


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """An image in an archive.

    Attributes:
      name: of the file, without folders.
      label: of its class.
      offset: where it begins, in bytes from the beginning of the outermost archive.
      size: bytes.
    """

    name: str
    label: int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Archive:
    """One of the archives, with a table of its images.

    Attributes:
      path: of the file.
      members: in the order in which they lie in it.
    """

    path: pathlib.Path
    members: list[Member]

    def read(self, index: int) -> bytes:
        """Returns an image as a JPEG of RGB or greys.

        It is the file as it is, but for the few that are CMYK or PNG, which are encoded again at
        quality 100, as TFDS does.

        Raises:
          UserError: it is no image, or cannot be read.
        """
        member = self.members[index]
        try:
            with self.path.open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
            if len(content) != member.size:
                raise OSError(f"it ends after {len(content):,} of {member.size:,} bytes")
            if images.is_common_jpeg(content):
                return content
            buffer = io.BytesIO()
            images.decode(content).save(buffer, "JPEG", quality=100)
            return buffer.getvalue()
        except (OSError, images.ImageError) as error:
            raise UserError(
                f"cannot read {member.name} in {self.path}: {error}\nDownload the archive again."
            ) from error


def find(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Returns the paths of both archives, by split of TFDS.

    Raises:
      UserError: one of them is not in the folder, or there is no such folder.
    """
    resolved = pathlib.Path(os.path.expanduser(folder))
    if not resolved.is_dir():
        kind = "a file" if resolved.exists() else "not there"
        raise UserError(
            f"config.data.archive is {os.fspath(folder)!r}, which is {kind}; it must be the folder "
            f"that holds {' and '.join(FILES.values())}"
        )
    paths = {split: resolved / name for split, name in FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise UserError(
                f"{path.name} is not in {resolved}; it must hold {' and '.join(FILES.values())}"
            )
    return paths


def index_train(
    path: pathlib.Path, *, synsets: tuple[str, ...], size: int, show_progress: bool
) -> Archive:
    """Finds the images in the archive of the training set.

    Args:
      path: of the archive.
      synsets: the classes, in the order of their labels.
      size: the number of images it must have.
      show_progress: whether to show a progress bar where stderr is a terminal.

    Returns:
      The archive.

    Raises:
      UserError: it is truncated, or is not that archive.
    """
    from tqdm import tqdm

    labels = {synset: label for label, synset in enumerate(synsets)}
    members, seen = [], set()
    with _reading(path, split="train"), tarfile.open(path, "r:") as outer:
        bar = tqdm(
            _files(outer),
            total=len(synsets),
            desc=f"Reading {path.name}",
            unit=" classes",
            disable=None if show_progress else True,  # None: only where stderr is a terminal.
        )
        for inner in bar:
            synset = posixpath.basename(inner.name).removesuffix(".tar")
            if synset not in labels or not inner.name.endswith(".tar") or synset in seen:
                raise tarfile.ReadError(f"it holds {inner.name}, and should hold a tar per class")
            seen.add(synset)
            for member in _files_within(outer, inner):
                name = posixpath.basename(member.name)
                if not name.startswith(f"{synset}_"):
                    raise tarfile.ReadError(f"its {inner.name} holds {member.name}")
                offset = inner.offset_data + member.offset_data
                members.append(Member(name, labels[synset], offset, member.size))
        for synset in synsets:
            if synset not in seen:
                raise tarfile.ReadError(f"it holds no {synset}.tar")
        _check_number(members, size=size)
    return Archive(path=path, members=members)


def index_validation(path: pathlib.Path, *, labels: tuple[int, ...]) -> Archive:
    """Finds the images in the archive of the validation set.

    Args:
      path: of the archive.
      labels: of the images, in the order of their numbers.

    Returns:
      The archive.

    Raises:
      UserError: it is truncated, or is not that archive.
    """
    numbers = {f"ILSVRC2012_val_{index + 1:08d}.JPEG": index for index in range(len(labels))}
    members = []
    with _reading(path, split="validation"), tarfile.open(path, "r:") as tar:
        for member in _files(tar):
            name = posixpath.basename(member.name)
            if name not in numbers:
                raise tarfile.ReadError(f"it holds {member.name}")
            members.append(Member(name, labels[numbers[name]], member.offset_data, member.size))
        _check_number(members, size=len(labels))
    return Archive(path=path, members=members)


@contextlib.contextmanager
def _reading(path: pathlib.Path, *, split: str) -> Iterator[None]:
    """Makes a UserError of whatever is wrong with an archive."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        has = f"{path.stat().st_size:,}" if path.is_file() else "no"
        raise UserError(
            f"the archive {path} is truncated, or not {FILES[split]}: {error}\n"
            f"It has {has} bytes, the published one {PUBLISHED_BYTES[split]:,}; download it again."
        ) from error


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields the members that are files."""
    for member in tar:
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or member.size < 1:
            raise tarfile.ReadError(f"{member.name} in it is not a plain file, or is empty")
        yield member


def _files_within(outer: tarfile.TarFile, inner: tarfile.TarInfo) -> Iterator[tarfile.TarInfo]:
    """Yields the files of a tar in a tar."""
    with outer.extractfile(inner) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _files(tar)
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"{inner.name} in it: {error}") from error


def _check_number(members: list[Member], *, size: int) -> None:
    """Raises an error where images are missing, or there twice."""
    if len(members) != size:
        raise tarfile.ReadError(f"it has {len(members):,} images, not {size:,}")
    names = {member.name for member in members}
    if len(names) != size:
        raise tarfile.ReadError(f"it has {size - len(names):,} images twice")
