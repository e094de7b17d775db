"""Small archives in the original layouts, for the tests of the data layer; no tests of its own."""

import io
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

from resnet_flax.data import archives, cifar

SIZES = {"train": 50, "test": 20}
KINDS = [(name, kind) for name in ("cifar10", "cifar100") for kind in ("binary", "python")]


def content(name):
    """Random images that are not flat, so that PNG uses its filters, and every class named."""
    random = np.random.RandomState(0)
    classes = {"label": 10} if name == "cifar10" else {"coarse_label": 20, "label": 100}
    images, labels = {}, {}
    for split, size in SIZES.items():
        smooth = np.cumsum(random.randint(0, 9, (size, 32, 32, 3)), axis=2)
        images[split] = smooth.astype(np.uint8)
        labels[split] = {
            key: random.randint(0, count, size).astype(np.uint8) for key, count in classes.items()
        }
    names = {key: tuple(f"{key} {i}" for i in range(count)) for key, count in classes.items()}
    return archives.Content(images, labels, names)


def archive_files(name, kind, protocol=2):
    """The files of an archive, by name."""
    layout, data, files = archives._LAYOUTS[name], content(name), {}
    for split, names in layout.files.items():
        parts = np.array_split(np.arange(SIZES[split]), len(names))
        for part, file in zip(parts, names, strict=True):
            pixels = data.images[split][part].transpose(0, 3, 1, 2).reshape(len(part), -1)
            columns = {k: data.labels[split][v][part] for k, v in layout.labels.items()}
            if kind == "binary":
                records = np.column_stack([*columns.values(), pixels])
                files[f"{file}.bin"] = records.tobytes()
            else:
                batch = {b"data": np.ascontiguousarray(pixels), b"filenames": [b"a.png"]}
                batch |= {f"{k}s".encode(): v.tolist() for k, v in columns.items()}
                files[file] = pickle.dumps(batch, protocol)
    names = {k: data.class_names[v] for k, v in layout.labels.items()}
    if kind == "python":
        meta = {f"{k}_names".encode(): [n.encode() for n in v] for k, v in names.items()}
        files[layout.names_file] = pickle.dumps(meta, protocol)
    elif name == "cifar10":
        files["batches.meta.txt"] = ("\n".join(names["label"]) + "\n\n").encode()
    else:
        files |= {f"{k}_names.txt": "\n".join(v).encode() for k, v in names.items()}
    return files


def write_tar(path, files):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"some folder/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def small_archive(folder, name="cifar10", kind="binary", **changes):
    path = pathlib.Path(folder) / f"{name.replace('r1', 'r-1')}-{kind}.tar.gz"
    return write_tar(path, archive_files(name, kind, **changes))


def publish(patch, name, *paths):
    """Makes files the published archives of a data set of `SIZES`, and the only ones."""
    sums = {path.name.removesuffix(".tar.gz"): archives.sha256_of(path) for path in paths}
    patch.setitem(archives.ARCHIVES, name, sums)
    patch.setattr(cifar, "SIZES", SIZES)


def real_data_dir():
    """The folder of the real, prepared CIFAR-10; skips the test where there is none."""
    place = os.environ.get("RESNET_FLAX_TEST_DATA_DIR") or os.environ.get("TFDS_DATA_DIR")
    shared = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tensorflow_datasets"
    path = pathlib.Path(place or shared).expanduser()
    if not (path / "cifar10").is_dir():
        pytest.skip(f"no prepared CIFAR-10 in {path}; set RESNET_FLAX_TEST_DATA_DIR")
    return path
