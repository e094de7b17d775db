"""A folder of images with a sub-folder for each class: a user's own data."""

import dataclasses
import hashlib
import os
import pathlib
import re
import sys

import numpy as np

from resnet_flax.data import dataset, image_files, streaming
from resnet_flax.errors import UserError

# Names of the folders of splits, in lower case and without the endings below.
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
}
_ENDING = re.compile(r"[\W_]*(set|data|images)$")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files by number: a `streaming.Source`."""

    root: pathlib.Path
    files: tuple[str, ...]  # relative to root, with "/"
    labels: np.ndarray  # int32 [N]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[bytes, int]:  # noqa: D102
        return (self.root / self.files[index]).read_bytes(), int(self.labels[index])

    def name(self, index: int) -> str:  # noqa: D102
        return str(self.root / self.files[index])


def load(
    data_dir: str | os.PathLike | None, geometry: streaming.Geometry | None
) -> dataset.Dataset:
    """Finds the images of a folder.

    `data_dir` has a folder of classes for each split: `train/cats/1.jpg`, `test/cats/2.jpg` and
    perhaps `val/cats/3.jpg`. Upper case and other usual names will do, and `val` without `test` is
    the test set. Or `data_dir` has the classes themselves, `cats/1.jpg`; a class-balanced tenth,
    the same for every seed, is then the test set. Classes are numbered in the order of their names.
    Folders inside a class belong to it. `image_files.find` says what an image is.

    The fingerprint covers names and sizes of the files: reading them all could take hours.

    Raises:
      UserError: the folder is absent, or is not a data set of two classes or more.
    """
    if not data_dir:
        raise UserError("config.data.name=folder needs config.data.data_dir, the images' folder")
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"config.data.data_dir={root} is not a folder")
    roots = _split_roots(root)
    class_names = tuple(_folders(roots["train"]))
    if len(class_names) < 2:
        raise UserError(
            f"{roots['train']} has {len(class_names)} sub-folders; it must have one for each "
            "class, at least two"
        )
    for place in roots.values():
        if extra := sorted(set(_folders(place)) - set(class_names)):
            raise UserError(f"{place} has the class {extra[0]!r}, which {roots['train']} lacks")
    seen = _distinct(roots, class_names) | {os.path.realpath(r) for r in (root, *roots.values())}
    splits = {}
    for kind, place in roots.items():
        source = _find(place, class_names, seen, may_lack=kind != "train")
        splits[kind] = streaming.whole(source, geometry, central=kind != "train")
    if "test" not in splits:
        kept, drawn = dataset.hold_out(splits["train"].labels, seed=0)  # The same for every run.
        if not len(drawn):
            raise UserError(
                f"{root} has one image a class, so that none can be held out for testing: add "
                "images, or put test images into test/ and the others into train/"
            )
        splits["train"], splits["test"] = splits["train"].divide(kept, drawn)
    train, validation, test = map(splits.get, ("train", "validation", "test"))
    return dataset.Dataset("folder", train, validation, test, class_names, _fingerprint(splits))


def _split_roots(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folder of each split; `root` itself, as "train", where there are none."""
    found: dict[str, pathlib.Path] = {}
    others = []
    for name in _folders(root):
        stem = _ENDING.sub("", name.lower())
        kind = next((kind for kind, names in _SPLITS.items() if stem in names), None)
        if kind is None:
            others.append(name)
        elif kind in found:
            raise UserError(f"{root} has both {found[kind].name}/ and {name}/; keep one")
        else:
            found[kind] = root / name
    # A class may be called "train", too, or "valid".
    if not found or (len(found) == 1 and not any(map(_folders, found.values()))):
        return {"train": root}
    if "train" not in found:
        raise UserError(f"{root} has {min(found.values()).name}/ but no train/ beside it")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    if unused := [name for name in others if any(image_files.find(root / name, set()))]:
        print(
            f"note: {root} has train/; its other folders of images are not used: "
            f"{', '.join(unused)}",
            file=sys.stderr,
        )
    return found


def _folders(root: pathlib.Path) -> list[str]:
    try:
        visible = [path for path in sorted(root.iterdir()) if image_files.is_visible(path.name)]
        for path in visible:
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link that leads nowhere; mend or remove it")
        return [path.name for path in visible if path.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error.strerror}") from error


def _distinct(roots: dict[str, pathlib.Path], class_names: tuple[str, ...]) -> set[str]:
    """The real paths of all classes' folders, of which no two may be the same."""
    found: dict[str, pathlib.Path] = {}
    for folder in [place / name for place in roots.values() for name in class_names]:
        other = found.setdefault(os.path.realpath(folder), folder)
        if other is not folder:
            raise UserError(f"{other} and {folder} are the same folder; remove one of the links")
    return set(found)


def _find(
    root: pathlib.Path, class_names: tuple[str, ...], seen: set[str], *, may_lack: bool
) -> FolderSource:
    def refuse(error: OSError):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    files, labels = [], []
    known = ", ".join(sorted(image_files.EXTENSIONS))
    for label, class_name in enumerate(class_names):
        folder = root / class_name
        below = image_files.find(folder, seen, refuse) if folder.exists() else ()
        found = sorted(pathlib.Path(path).relative_to(root).as_posix() for path in below)
        if not found and not may_lack:
            raise UserError(f"{folder} has no images ({known}); add some, or remove the folder")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"{root} has no images ({known})")
    return FolderSource(root, tuple(files), np.array(labels, np.int32))


def _fingerprint(splits: dict[str, streaming.StreamedSplit]) -> str:
    digest = hashlib.sha256()
    for kind in filter(splits.get, _SPLITS):
        digest.update(f"{kind}\n".encode())
        source = splits[kind].source
        for i in splits[kind].positions.tolist():
            try:
                size = os.stat(source.name(i)).st_size
            except OSError:  # A dangling link is passed over like other unreadable files.
                size = -1
            digest.update(f"{source.files[i]}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
