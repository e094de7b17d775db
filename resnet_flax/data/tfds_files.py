"""Data sets in TFDS's files: found, read and written without TensorFlow."""

import contextlib
import functools
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from resnet_flax import locks
from resnet_flax.errors import UserError, first_line

INFO_FILE = "dataset_info.json"
FORMAT = "array_record"  # the one format that TFDS reads without TensorFlow or pyarrow
_CHUNK = 1000  # examples read at a time


def resolve_data_dir(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """The absolute path of the directory of prepared data sets.

    None or "" stands for $TFDS_DATA_DIR, or else for TFDS's default, ~/tensorflow_datasets, which
    need not exist.

    Raises:
      UserError: it is a URL or a file, or was named and does not exist.
    """
    named = data_dir or os.environ.get("TFDS_DATA_DIR")
    origin = "data_dir" if data_dir else "$TFDS_DATA_DIR"
    chosen = os.fspath(named or "~/tensorflow_datasets")
    if "://" in chosen:
        raise UserError(f"{origin} is {chosen!r}; copy the data set to a directory of this machine")
    path = pathlib.Path(os.path.abspath(os.path.expanduser(chosen)))
    if path.exists() and not path.is_dir():
        raise UserError(f"{origin} is {chosen!r}, a file; give the directory of the data sets")
    if named and not path.exists():
        raise UserError(
            f"{origin} is {chosen!r}, which does not exist: correct it, or, to have the data set "
            f"put there, create it first (mkdir -p {shlex.quote(str(path))})"
        )
    return path


def find(name: str, *, data_dir: pathlib.Path, version: str) -> pathlib.Path | None:
    """Returns the directory of a prepared data set, or None where there is none.

    `data_dir` is the directory of all data sets, of this one, or of one version of it. `version` is
    preferred where there are several; otherwise the highest is taken.

    Raises:
      UserError: `data_dir` cannot be read, or holds something else in the data set's place.
    """
    try:
        if (data_dir / INFO_FILE).is_file():
            return data_dir
        found = _versions(data_dir / name) or _versions(data_dir)
        if found:
            newest = max(found, key=lambda name: [int(number) for number in name.split(".")])
            return found.get(version) or found[newest]
        occupied = data_dir / name / version
        if occupied.is_dir() and any(occupied.iterdir()):
            raise UserError(
                f"{occupied} has no {INFO_FILE}, so it is not a prepared data set; "
                "move it away, or give another config.data.data_dir"
            )
    except OSError as error:
        raise UserError(f"cannot look for {name} in data_dir {data_dir}: {error}") from error
    return None


def _versions(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    return {
        path.name: path
        for path in (directory.iterdir() if directory.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / INFO_FILE).is_file()
    }


def read_info(name: str, *, directory: pathlib.Path, sizes: dict[str, int], classes: int):
    """Returns TFDS's `DatasetInfo` of a data set with so many examples a split, and classes.

    Raises:
      UserError: it is another data set, damaged, or in a format that needs TensorFlow.
    """
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(directory).info
        found = {split: info.splits[split].num_examples for split in sizes}
        formats = {info.file_format, *info.alternative_file_formats} - {None}
        found_classes = len(info.features["label"].names)
    except Exception as error:  # Anything may come out of a damaged or foreign directory.
        reason = first_line(error)
        raise UserError(f"{directory} is not a {name} prepared by TFDS: {reason}") from error
    if info.name != name:
        raise UserError(f"{directory} holds the data set {info.name!r}, not {name!r}")
    if FORMAT not in [known.value for known in formats]:
        raise UserError(
            f"{directory} is in the format {info.file_format.value}, which needs TensorFlow to "
            f"read; give another config.data.data_dir, to have {name} prepared there as {FORMAT}"
        )
    if (found, found_classes) != (sizes, classes):
        raise UserError(
            f"{directory} has {found} examples of {found_classes} classes; {name} has {sizes} of "
            f"{classes}"
        )
    return info


class Examples:
    """The examples of one prepared split: TFDS's features, with images as bytes, not decoded.

    A pickle holds no more than a path: each process opens the files when it first reads.
    """

    def __init__(self, directory: pathlib.Path, split: str):
        self.directory, self.split = directory, split

    def __reduce__(self):
        return type(self), (self.directory, self.split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an example; raises an OSError where it cannot be read."""
        return self._read([index])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _CHUNK):
            yield from self._read(list(range(start, min(start + _CHUNK, len(self)))))

    def _read(self, indices: list[int]) -> list[dict[str, Any]]:
        try:
            return self._source.__getitems__(indices)
        except Exception as error:  # array_record raises many kinds.
            raise OSError(first_line(error)) from error

    @functools.cached_property
    def _source(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.directory).as_data_source(
            split=self.split, decoders={"image": tfds.decode.SkipDecoding()}, file_format=FORMAT
        )


def prepare(
    name: str,
    *,
    version: str,
    data_dir: pathlib.Path,
    obtain: Callable[[], tuple[dict[str, Iterable], dict[str, Sequence[str]]]],
) -> pathlib.Path:
    """Writes a data set as TFDS itself would, in its order and files; returns its directory.

    It appears in `data_dir` whole or not at all. One process writes, and others that want the same
    wait for it. The next process deletes what a killed one has left.

    `obtain` returns the examples of each split and the class names of each label. An example is a
    key, by which TFDS shuffles, and its features, with images encoded.

    Raises:
      UserError: it cannot be written, or `obtain` raises one.
    """
    try:
        with _staging(data_dir, name) as staging:
            # Another process may have prepared it while this one waited.
            found = find(name, data_dir=data_dir, version=version)
            if found is not None:
                return found
            written = _write(name, *obtain(), staging)
            final = data_dir / written.relative_to(staging)
            final.parent.mkdir(exist_ok=True)
            if not (final / INFO_FILE).is_file():  # Else a process was faster, without locks.
                written.rename(final)
            return final
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError on a full disk.
        raise UserError(
            f"cannot prepare {name} in {data_dir}: {first_line(error)}; make room, or give another "
            "config.data.data_dir"
        ) from error


@contextlib.contextmanager
def _staging(data_dir: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """An empty directory beside the data sets; only one process at a time can be in here."""
    path = data_dir / f".{name}.preparing"
    data_dir.mkdir(parents=True, exist_ok=True)
    # Never deleted: one process could wait for the deleted file, another lock a new one.
    with open(data_dir / f".{name}.lock", "a") as lock:
        held = locks.hold(lock)
        if held is False:
            print(f"Another process prepares {name} in {data_dir}; waiting", file=sys.stderr)
            locks.hold(lock, wait=True)
        elif held is None:
            # A file system without locks: each process has its own directory, the first wins.
            path = data_dir / f".{name}.preparing-{os.uname().nodename}-{os.getpid()}"
        shutil.rmtree(path, ignore_errors=True)
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _write(name: str, examples, class_names, directory: pathlib.Path) -> pathlib.Path:
    import tensorflow_datasets as tfds

    builder = tfds.builder_cls(name)(data_dir=directory)
    for label, names in class_names.items():
        builder.info.features[label].names = list(names)
    # In place of the download, whose files TFDS reads with TensorFlow.
    builder._split_generators = lambda download_manager: examples
    # TFDS would print the size of a download and the name of the staging directory.
    builder._log_download_bytes = builder._log_download_done = lambda: None
    tfds.display_progress_bar(False)  # They appear even where stderr is no terminal.
    try:
        builder.download_and_prepare(
            file_format=FORMAT, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    finally:
        tfds.display_progress_bar(True)
    return pathlib.Path(builder.data_path)
