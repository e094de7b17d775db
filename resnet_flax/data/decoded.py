"""Keeps a decoded data set, which then loads in a fraction of the time.

A file of this kind is an uncompressed npz, whose checksums are verified as it is read. It is found
by the names, sizes and times of the files that it was made from.
"""

import contextlib
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np

from resnet_flax.devices import cache

Arrays = dict[str, np.ndarray]

# Of what the arrays are and of their order: a change makes them anew.
_FORMAT = 1


def read(name: str, source: pathlib.Path, load: Callable[[], Arrays]) -> Arrays:
    """Returns what `load()` returns, or returned before, when the source was the same.

    Args:
      name: of the data set.
      source: the file or directory that it is made from.
      load: decodes it: arrays by name, none of them of objects.
    """
    folder = cache.directory("data")
    if folder is None:
        return load()
    path = folder / f"{name}-{_FORMAT}-{_identify(source)}.npz"
    # Whatever is wrong with it: it can be made again.
    with contextlib.suppress(Exception):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return {key: kept[key] for key in kept.files}
    arrays = load()
    # A disk may be full.
    with contextlib.suppress(OSError):
        _write(path, arrays)
        cache.make_room(folder)
    return arrays


def _write(path: pathlib.Path, arrays: Arrays) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise


def _identify(source: pathlib.Path) -> str:
    """Changes whenever the file, or a file of the directory, does."""
    digest = hashlib.sha256(os.path.realpath(source).encode())
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return digest.hexdigest()[:24]
