"""A folder of images with a sub-folder for each class: a user's own data."""

import dataclasses
import hashlib
import os
import pathlib

import numpy as np

from resnet_flax.data import dataset, streamed
from resnet_flax.errors import UserError

# Names of sub-folders that hold a split each, where there are any.
_TRAIN = ("train", "training")
_TEST = ("test", "val", "valid", "validation")
EXTENSIONS = frozenset(".bmp .gif .jpe .jpeg .jpg .png .ppm .pgm .tif .tiff .webp".split())
TEST_SEED = 0  # Fixed: the test set must be the same for every run.


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files by number; see `streamed.Source`.

    Attributes:
      root: folder that `files` are relative to.
      files: paths, with "/".
      file_labels: int32 [N].
    """

    root: pathlib.Path
    files: tuple[str, ...]
    file_labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def labels(self) -> np.ndarray:
        """Labels of all images, int32 [N]."""
        return self.file_labels

    def read(self, index: int) -> tuple[bytes, int]:
        """Content of an image file, and its label."""
        return (self.root / self.files[index]).read_bytes(), int(self.file_labels[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.root / self.files[index])


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None,
    split: str,
    seed: int,
    geometry: streamed.Geometry,
    **unused,
) -> dataset.Dataset:
    """Finds the images of a folder; the arguments are those of `resnet_flax.data.load`.

    Either `data_dir` has a folder of classes for each split, `train/cats/1.jpg` and
    `test/cats/2.jpg` (also `val`, `validation`), or it has the classes themselves, `cats/1.jpg`:
    then a class-balanced tenth, the same for every seed, is the test set. Classes are numbered in
    the order of their names. Hidden files and files of other types than `EXTENSIONS` are left
    alone; folders within a class's folder belong to the class.

    Raises:
      UserError: there is no such folder, or what is in it is not a data set of two classes or more.
    """
    del unused
    dataset.check_split(split)
    if not data_dir:
        raise UserError("config.data.data_dir is empty; with config.data.name=folder it must name "
                        "the folder of the images")  # fmt: skip
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.data_dir={root} is not a folder")
    train_root, test_root = _one_of(root, _TRAIN), _one_of(root, _TEST)
    if test_root is not None and train_root is None:
        raise UserError(f"{root} has {test_root.name}/ but no train/ beside it")
    class_names = _classes(train_root or root)
    source = _find(train_root or root, class_names)
    if test_root is not None:
        extra = sorted(set(_folders(test_root)) - set(class_names))
        if extra:
            raise UserError(f"{test_root} has the class {extra[0]!r}, which {train_root} lacks")
        test_source = _find(test_root, class_names, may_lack=True)
        train, test = np.arange(len(source)), np.arange(len(test_source))
    else:
        test_source = source
        labels = source.labels()
        test = dataset.balanced_draw(labels, parts=dataset.HELD_OUT_PARTS, seed=TEST_SEED)
        if not len(test):
            raise UserError(
                f"{root} has too few images a class to hold a tenth out for testing: add images, "
                "or put test images into test/ and the others into train/"
            )
        train = np.setdiff1d(np.arange(len(source)), test)
    return streamed.assemble(
        name,
        source=source,
        train=train,
        test_source=test_source,
        test=test,
        class_names=class_names,
        fingerprint=_fingerprint(source, test_source, train, test),
        split=split,
        seed=seed,
        geometry=geometry,
    )


def _one_of(root: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
    found = [root / name for name in names if (root / name).is_dir()]
    if len(found) > 1:
        raise UserError(f"{root} has both {found[0].name}/ and {found[1].name}/; keep one of them")
    return found[0] if found else None


def _folders(root: pathlib.Path) -> list[str]:
    try:
        return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error.strerror}") from error


def _classes(root: pathlib.Path) -> tuple[str, ...]:
    names = _folders(root)
    if len(names) < 2:
        raise UserError(
            f"{root} has {len(names)} sub-folders; it must have one for each class, at least two"
        )
    return tuple(names)


def _find(root: pathlib.Path, class_names: tuple[str, ...], may_lack: bool = False) -> FolderSource:
    files, labels = [], []
    for label, class_name in enumerate(class_names):
        found = sorted(_images_below(root / class_name, root))
        if not found and not may_lack:
            raise UserError(
                f"{root / class_name} has no images ({', '.join(sorted(EXTENSIONS))}); add some, "
                "or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{root} has no images ({', '.join(sorted(EXTENSIONS))})")
    return FolderSource(root, tuple(files), np.array(labels, np.int32))


def _images_below(folder: pathlib.Path, root: pathlib.Path):
    def refuse(error: OSError):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    if not folder.exists():
        return
    # Links are followed, as most who link folders of images together expect.
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS:
                yield pathlib.Path(place, file).relative_to(root).as_posix()


def _fingerprint(
    source: FolderSource, test_source: FolderSource, train: np.ndarray, test: np.ndarray
) -> str:
    """SHA-256 of the files' names and sizes: reading them all could take hours."""
    digest = hashlib.sha256()
    for title, images, positions in (("train", source, train), ("test", test_source, test)):
        digest.update(f"{title}\n".encode())
        for i in positions.tolist():
            size = os.stat(images.root / images.files[i]).st_size
            digest.update(f"{images.files[i]}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
