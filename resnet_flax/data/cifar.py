"""CIFAR-10 and CIFAR-100: found where TFDS has prepared them, or else prepared."""

import io
import os
import pathlib
import sys
from typing import Any

import numpy as np

from resnet_flax.data import archive, dataset, decoded, download, prepare, prepared
from resnet_flax.errors import UserError

VERSION = "3.0.2"  # of both data sets in TFDS
SHAPE = (32, 32, 3)
SIZES = {"train": 50_000, "test": 10_000}
CLASSES = {"cifar10": 10, "cifar100": 100}
_BYTES_PER_EXAMPLE = 2_400  # on disk, on average


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None,
    split: str,
    archive: str | os.PathLike | None,
    mirror: str | None,
    seed: int,
    show_progress: bool,
    **unused,
) -> dataset.Dataset:
    """Loads CIFAR-10 or CIFAR-100; the arguments are those of `resnet_flax.data.load`."""
    del unused
    dataset.check_split(split)  # Before the minutes that a preparation may take.
    root = prepared.resolve_data_dir(data_dir)
    directory = prepared.find(name, data_dir=root, version=VERSION)
    if directory is None:
        directory = make(
            name,
            data_dir=root,
            archive_path=archive,
            mirror=mirror,
            show_progress=show_progress,
        )
    arrays = decoded.read(name, directory, lambda: _decode(name, directory))
    train, test = (
        dataset.Split(arrays.pop(f"{part}_images"), arrays.pop(f"{part}_labels"))
        for part in ("train", "test")
    )
    return dataset.assemble(
        name,
        train=train,
        test=test,
        class_names=tuple(arrays["class_names"].tolist()),
        split=split,
        seed=seed,
    )


def _decode(name: str, directory: pathlib.Path) -> decoded.Arrays:
    arrays, class_names = prepared.read(
        name, directory=directory, sizes=SIZES, shape=SHAPE, classes=CLASSES[name]
    )
    found = {"class_names": np.array(class_names)}
    for part in SIZES:
        split = dataset.canonical(*arrays.pop(part))
        found |= {f"{part}_images": split.images, f"{part}_labels": split.labels}
    return found


def make(
    name: str,
    *,
    data_dir: pathlib.Path,
    archive_path: str | os.PathLike | None,
    mirror: str | None,
    show_progress: bool,
    sizes: dict[str, int] = SIZES,
    layouts: dict[str, tuple[archive.Layout, ...]] = archive.LAYOUTS,
    origin: str = download.ORIGIN,
) -> pathlib.Path:
    """Prepares a data set from its original archive.

    Args:
      name: of the data set.
      data_dir: folder of data sets.
      archive_path: of an archive, or None or "".
      mirror: URL of an archive or of a folder of them, or None or "".
      show_progress: whether to say on stderr what takes long.
      sizes: the number of examples that each split must have.
      layouts: the known archives of every data set.
      origin: URL of the folder of the authors.

    Returns:
      The folder of the prepared version.

    Raises:
      UserError: no archive can be had, or it is not what it should be, or the result cannot be
        written.
    """
    prepare.refuse_occupied(name, data_dir=data_dir, version=VERSION)
    # Before anything is written.
    content = None
    if archive_path:
        content = _read(archive_path, name=name, sizes=sizes, layouts=layouts)
    sources = download.candidates(mirror, layouts=layouts[name], origin=origin)
    with prepare.exclusive(data_dir, name=name, show_progress=show_progress) as staging:
        # Another process may have prepared it while this one waited.
        directory = prepared.find(name, data_dir=data_dir, version=VERSION)
        if directory is not None:
            return directory
        if content is None:
            path = _obtain(
                name,
                sources=sources,
                data_dir=data_dir,
                layouts=layouts[name],
                show_progress=show_progress,
            )
            content = _read(path, name=name, sizes=sizes, layouts=layouts)
        if show_progress:
            print(f"Preparing {name} in {data_dir} (once; less than a minute)", file=sys.stderr)
        return prepare.prepare(
            name,
            splits={key: examples(content, split=key) for key in content.images},
            names=content.names,
            data_dir=data_dir,
            staging=staging,
            show_progress=show_progress,
        )


def examples(content: archive.Content, *, split: str) -> prepare.Examples:
    """Returns the examples of a split as TFDS has them: images as PNG, numbered keys and ids."""
    from PIL import Image

    images, labels = content.images[split], content.labels[split]

    def read(index: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, "PNG")
        record = {key: int(values[index]) for key, values in labels.items()}
        return {"id": f"{split}_{index:05d}", "image": buffer.getvalue(), **record}

    size = len(images) * _BYTES_PER_EXAMPLE
    return prepare.Examples(keys=range(len(images)), read=read, size=size)


def _read(
    path: str | os.PathLike,
    *,
    name: str,
    sizes: dict[str, int],
    layouts: dict[str, tuple[archive.Layout, ...]],
) -> archive.Content:
    """Verifies and reads an archive."""
    resolved, layout = archive.identify(path, name=name, layouts=layouts)
    return archive.read(resolved, layout=layout, sizes=sizes)


def _obtain(
    name: str,
    *,
    sources: list[tuple[str, archive.Layout]],
    data_dir: pathlib.Path,
    layouts: tuple[archive.Layout, ...],
    show_progress: bool,
) -> pathlib.Path:
    """Returns the path of an archive that is there already or is downloaded now."""
    folder = data_dir / "downloads"
    for layout in layouts:
        # The second is where TFDS wants archives that were downloaded by hand.
        for path in (folder / layout.file_name, folder / "manual" / layout.file_name):
            try:
                if path.is_file() and archive.sha256_of(path) == layout.sha256:
                    return path
            except OSError:
                continue  # Unreadable is as good as absent.
    failures = []
    for url, layout in sources:
        try:
            return download.fetch(
                url,
                layout=layout,
                folder=folder,
                show_progress=show_progress,
                open_seconds=download.OPEN_SECONDS / len(sources),
            )
        except download.SourceError as error:
            failures.append(str(error))
            if show_progress:
                print(f"Cannot download: {error}", file=sys.stderr)
    raise UserError(
        f"there is no prepared {name} in {data_dir}, and it cannot be downloaded "
        f"({'; '.join(failures)}).\n"
        "Set config.data.data_dir to a folder of prepared TFDS data sets, or config.data.archive "
        f"to a downloaded {layouts[0].file_name}, or config.data.mirror to the URL of a copy of it."
    )
