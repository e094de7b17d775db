"""Prepares data sets as TFDS does, but without TensorFlow.

TFDS's own builders need TensorFlow to read archives, to encode images, and to sort more than a
gigabyte of examples, and nothing else of it does. A subclass that brings its examples encoded and
in order writes what TFDS itself, with or without TensorFlow, then reads as the data set of that
name and version.
"""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from resnet_flax.data import prepared
from resnet_flax.errors import UserError

_ROOM = 1.1  # times the size of the examples, so much must be free


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Attributes:
      keys: of the examples, the same as TFDS's: it shuffles by them.
      read: returns the features of the example at a position in `keys`, images encoded.
      size: of all of them, in bytes, about.
    """

    keys: Sequence[int | str]
    read: Callable[[int], dict[str, Any]]
    size: int


@contextlib.contextmanager
def exclusive(data_dir: pathlib.Path, *, name: str, show_progress: bool) -> Iterator[pathlib.Path]:
    """Holds off other processes that would prepare the same data set in the same folder.

    The lock goes with the process that holds it, however that ends.

    Args:
      data_dir: folder of data sets; made where it does not exist.
      name: of the data set.
      show_progress: whether to say on stderr that another process is waited for.

    Yields:
      A folder to prepare in, empty, on the same file system; whatever is in it afterwards is
      removed. It is always the same one, so that what a killed process left in it is removed, too,
      except where the file system has no locks.

    Raises:
      UserError: the folder cannot be written to.
    """
    staging = data_dir / f".{name}.preparing"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # Never deleted: a process could be waiting for the deleted one, another take a new one.
        lock = (data_dir / f".{name}.lock").open("a")
    except OSError as error:
        raise UserError(
            f"cannot write to data_dir {data_dir}: {error.strerror}; "
            "give another folder with config.data.data_dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if show_progress:
                print(f"Another process prepares {name} in {data_dir}; waiting", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Some cluster file systems have no locks. Nobody can then tell whose the common folder
            # is, so that each process gets its own, and the first to finish wins.
            staging = data_dir / f".{name}.preparing-{os.uname().nodename}-{os.getpid()}"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir()
            except OSError as error:
                raise UserError(f"cannot write to data_dir {data_dir}: {error}") from error
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def refuse_occupied(name: str, *, data_dir: pathlib.Path, version: str) -> None:
    """Raises a UserError where something else is in the place of a data set to be prepared."""
    final = data_dir / name / version
    if (final / prepared.INFO_FILE).is_file():
        return  # Since somebody looked, another process has finished it.
    if final.is_dir() and any(final.iterdir()):
        raise UserError(
            f"{final} is there but has no {prepared.INFO_FILE}, so it is not a prepared data set; "
            "move it away or give another folder with config.data.data_dir"
        )


def prepare(
    name: str,
    *,
    splits: dict[str, Examples],
    names: dict[str, tuple[str, ...]],
    data_dir: pathlib.Path,
    staging: pathlib.Path,
    show_progress: bool,
) -> pathlib.Path:
    """Writes a data set for TFDS.

    Args:
      name: of the data set in TFDS.
      splits: the examples, for each split of TFDS.
      names: the names of the classes, for each label of whose classes TFDS does not know the names.
      data_dir: folder of data sets; the result appears in it whole or not at all.
      staging: an empty folder on the same file system.
      show_progress: whether to show a progress bar where stderr is a terminal.

    Returns:
      The folder of the version.

    Raises:
      UserError: the result cannot be written, or something else is in its place, or whatever
        `Examples.read` raises it for.
    """
    # Takes a few tenths of a second to import; `import resnet_flax` should not.
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    free = shutil.disk_usage(staging).free
    needed = int(_ROOM * sum(examples.size for examples in splits.values()))
    if free < needed:
        raise UserError(
            f"{data_dir} has {free // 10**6} MB free; preparing {name} takes {needed // 10**6} MB"
        )
    bar = tqdm(
        total=sum(len(examples.keys) for examples in splits.values()),
        desc=f"Preparing {name}",
        unit=" images",
        disable=None if show_progress else True,  # None: shown only where stderr is a terminal.
    )
    try:
        with bar, _quiet_tfds():
            prepared_class = _builder_class(name, splits=splits, names=names, tick=bar.update)
            builder = prepared_class(data_dir=staging)
            builder.download_and_prepare(
                file_format=prepared.READABLE_FORMAT,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError on a full disk.
        raise UserError(
            f"cannot prepare {name} in {data_dir}: {prepared.first_line(error)}"
        ) from error
    made = pathlib.Path(builder.data_dir)
    final = data_dir / made.relative_to(staging)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        made.rename(final)
    except OSError as error:
        if not (final / prepared.INFO_FILE).is_file():  # Else another process was faster.
            raise UserError(f"cannot put the prepared {name} at {final}: {error}") from error
    return final


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Turns TFDS's own progress bars off for a while; they do not care about terminals."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.utils import tqdm_utils

    active = getattr(tqdm_utils, "_active", True)
    tfds.display_progress_bar(False)
    try:
        yield
    finally:
        tfds.display_progress_bar(active)


def _builder_class(
    name: str,
    *,
    splits: dict[str, Examples],
    names: dict[str, tuple[str, ...]],
    tick: Callable[[], object],
) -> type:
    """Returns a subclass of TFDS's builder that takes its examples from `splits`.

    `tick` is called after each of them.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_builder, hashing
    from tensorflow_datasets.core.utils import shard_utils

    base = tfds.builder_cls(name)
    stock_name = name  # The class body below has a `name` of its own.

    class Prepared(dataset_builder.ShardBasedBuilder, base, skip_registration=True):
        """TFDS's builder, without TensorFlow and without network.

        It writes file after file; the base class would sort the examples on disk, with TensorFlow.
        """

        name = stock_name

        def _shard_iterators_per_split(self, dl_manager):
            for key, values in names.items():
                self.info.features[key].names = list(values)
            return {split: self._shards(split) for split in splits}

        def _shards(self, split):
            """Returns, for each file, what yields its examples."""
            keys, size = splits[split].keys, splits[split].size
            hasher = hashing.Hasher(split)
            # TFDS's own order and number of files.
            order = sorted(range(len(keys)), key=lambda index: hasher.hash_key(keys[index]))
            number = shard_utils.ShardConfig().get_number_shards(size, len(keys))
            ends = shard_utils.get_shard_boundaries(len(keys), number)
            starts = [0, *ends[:-1]]
            return [
                functools.partial(self._examples, split, order[start:end])
                for start, end in zip(starts, ends, strict=True)
            ]

        def _examples(self, split, indices):
            for index in indices:
                # Not all versions of TFDS encode here themselves; to encode twice does no harm.
                example = self.info.features.encode_example(splits[split].read(index))
                yield splits[split].keys[index], example
                tick()

        def _log_download_bytes(self):
            """Says nothing: TFDS prints the size to download, and nothing is downloaded."""

        def _log_download_done(self):
            """Says nothing: TFDS prints the folder, which is about to be renamed."""

    # It goes into the metadata as the place of the code that can read the data set.
    Prepared.__module__ = base.__module__
    return Prepared
