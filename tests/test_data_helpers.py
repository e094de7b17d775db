"""Small archives in the original layouts, for the tests of the data layer; no tests of its own."""

import dataclasses
import io
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

from resnet_flax.data import archive, cifar, prepared

SIZES = {"train": 50, "test": 20}
ALL = [(name, binary) for name in ("cifar10", "cifar100") for binary in (True, False)]


def content(name, *, seed=0):
    """Random images that are not flat, so that PNG uses its filters, and every class named."""
    random = np.random.RandomState(seed)
    classes = {"label": 10} if name == "cifar10" else {"coarse_label": 20, "label": 100}
    images, labels = {}, {}
    for split, size in SIZES.items():
        smooth = np.cumsum(random.randint(0, 9, (size, 32, 32, 3)), axis=2)
        images[split] = smooth.astype(np.uint8)
        labels[split] = {
            key: random.randint(0, count, size).astype(np.uint8) for key, count in classes.items()
        }
    names = {key: tuple(f"{key} {i}" for i in range(count)) for key, count in classes.items()}
    return archive.Content(images=images, labels=labels, names=names)


def rows(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def members(layout, data, *, protocol=2):
    """The files of an archive, by name."""
    files = {}
    for split, names in (("train", layout.train), ("test", layout.test)):
        for part, name in zip(
            np.array_split(np.arange(SIZES[split]), len(names)), names, strict=True
        ):
            pixels = rows(data.images[split][part])
            labels = {label: data.labels[split][label[0]][part] for label in layout.labels}
            if layout.binary:
                columns = [values[:, None] for values in labels.values()]
                files[name] = np.concatenate([*columns, pixels], axis=1).tobytes()
            else:
                batch = {b"batch_label": b"some", b"data": pixels, b"filenames": [b"a.png"] * 3}
                for label, values in labels.items():
                    batch[label[1].encode()] = values.tolist()
                files[name] = pickle.dumps(batch, protocol)
    if layout.binary:
        for label in layout.labels:
            files[label[2]] = ("\n".join(data.names[label[0]]) + "\n\n").encode()
    else:
        meta = {b"num_vis": 3072}
        for label in layout.labels:
            meta[label[3].encode()] = [name.encode() for name in data.names[label[0]]]
        files[layout.meta] = pickle.dumps(meta, protocol)
    return files


def write_tar(path, files):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def layout_of(name, *, binary):
    (layout,) = (layout for layout in archive.LAYOUTS[name] if layout.binary == binary)
    return layout


def published(path, layout):
    """The layout, with the size and checksum of this very file."""
    return dataclasses.replace(
        layout, size=path.stat().st_size, sha256=archive.sha256_of(pathlib.Path(path))
    )


def small_archive(folder, name="cifar10", *, binary=True, protocol=2, data=None):
    """Writes a small archive; returns its path and layout."""
    layout = layout_of(name, binary=binary)
    files = members(layout, data or content(name), protocol=protocol)
    path = write_tar(
        pathlib.Path(folder) / layout.file_name,
        {f"{layout.folder}/{file}": data for file, data in files.items()},
    )
    return path, published(path, layout)


def make(data_dir, *, archive_path, layout, name="cifar10"):
    return cifar.make(
        name,
        data_dir=data_dir,
        archive_path=archive_path,
        mirror=None,
        show_progress=False,
        sizes=SIZES,
        layouts={name: (layout,)},
        origin="http://origin.invalid/",
    )


def read(directory, *, name="cifar10", sizes=None, classes=None):
    return prepared.read(
        name,
        directory=directory,
        sizes=sizes or SIZES,
        shape=(32, 32, 3),
        classes=classes or cifar.CLASSES[name],
    )


def real_data_dir():
    """The folder of the real, prepared CIFAR-10; skips the test where there is none."""
    repository = pathlib.Path(__file__).resolve().parents[1]
    place = os.environ.get("RESNET_FLAX_TEST_DATA_DIR") or os.environ.get("TFDS_DATA_DIR")
    path = pathlib.Path(place or repository.parent / "shared" / "tensorflow_datasets").expanduser()
    if not (path / "cifar10").is_dir():
        pytest.skip(f"no prepared CIFAR-10 in {path}; set RESNET_FLAX_TEST_DATA_DIR")
    return path
