"""CIFAR-10 and CIFAR-100: read where TFDS has prepared them, or else prepared first."""

import io
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from resnet_flax.data import archives, dataset, decoded, download, tfds_files
from resnet_flax.errors import UserError, first_line

VERSION = "3.0.2"  # of both data sets in TFDS
SHAPE = (32, 32, 3)
SIZES = {"train": 50_000, "test": 10_000}
CLASSES = {"cifar10": 10, "cifar100": 100}


def load(name: str, data_dir, archive, mirror) -> dataset.Dataset:
    """CIFAR without a validation split; see `resnet_flax.data.load`."""
    root = tfds_files.resolve_data_dir(data_dir)
    directory = tfds_files.find(name, data_dir=root, version=VERSION)
    if directory is None:
        directory = _prepare(name, root, archive, mirror)
    arrays = decoded.read(name, directory, lambda: _decode(name, directory))
    train, test = (dataset.Split(arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in SIZES)
    class_names, fingerprint = arrays["class_names"].tolist(), dataset.fingerprint(train, test)
    return dataset.Dataset(name, train, None, test, tuple(class_names), fingerprint)


def _prepare(name: str, data_dir: pathlib.Path, archive, mirror) -> pathlib.Path:
    # What the user named is checked before anything is written.
    given = archives.read(archive, name) if archive else None
    sources = download.list_sources(name, mirror)

    def obtain():
        content = given or archives.read(download.obtain(name, sources, data_dir), name)
        print(f"Preparing {name} in {data_dir} (once; less than a minute)", file=sys.stderr)
        return {split: _examples(content, split) for split in SIZES}, content.class_names

    return tfds_files.prepare(name, version=VERSION, data_dir=data_dir, obtain=obtain)


def _examples(content: archives.Content, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the keys and features that TFDS's own builder makes of an archive."""
    from tqdm import tqdm

    # disable=None: shown where stderr is a terminal.
    images = tqdm(content.images[split], f"Preparing {split}", unit=" images", disable=None)
    for index, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        labels = {key: int(values[index]) for key, values in content.labels[split].items()}
        yield index, {"id": f"{split}_{index:05d}", "image": buffer.getvalue(), **labels}


def _decode(name: str, directory: pathlib.Path) -> decoded.Arrays:
    """Both splits in canonical order, and the names of the classes."""
    info = tfds_files.read_info(name, directory=directory, sizes=SIZES, classes=CLASSES[name])
    arrays = {"class_names": np.array(info.features["label"].names)}
    for split, size in SIZES.items():
        images, labels = np.empty((size, *SHAPE), np.uint8), np.empty(size, np.int32)
        try:
            # Threads would make it slower: most of the time is Python's own, per image.
            for index, example in enumerate(tfds_files.Examples(directory, split)):
                with Image.open(io.BytesIO(example["image"])) as opened:
                    image = np.asarray(opened)
                # Assignment would broadcast a wrong shape and wrap a wrong dtype.
                if image.shape != SHAPE or image.dtype != np.uint8:
                    raise ValueError(f"example {index} is {image.dtype} {image.shape}, not {SHAPE}")
                images[index], labels[index] = image, example["label"]
        except Exception as error:  # Pillow raises many kinds.
            files = " or ".join(os.fspath(path) for path in info.splits[split].filepaths)
            raise UserError(
                f"cannot read {files}: {first_line(error)}\n"
                f"Delete {directory} to have {name} prepared again, or give another data_dir."
            ) from error
        found = dataset.canonical(images, labels)
        arrays |= {f"{split}_images": found.images, f"{split}_labels": found.labels}
    return arrays
