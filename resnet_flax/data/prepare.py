"""Prepares CIFAR as TFDS does, but without TensorFlow.

TFDS's own builder needs TensorFlow to read the batches and to encode the images, and nothing else
of it does. A subclass that brings its own reader and encoder writes what TFDS itself, with or
without TensorFlow, then reads as the data set of that name and version.
"""

import contextlib
import fcntl
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator

import numpy as np

from resnet_flax.data import archive, prepared
from resnet_flax.errors import UserError

_BYTES_PER_EXAMPLE = 5_000  # on disk at most, while TFDS sorts them and holds them twice


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


def prepare(
    name: str,
    *,
    content: archive.Content,
    data_dir: pathlib.Path,
    staging: pathlib.Path,
    show_progress: bool,
) -> pathlib.Path:
    """Writes a data set for TFDS.

    Args:
      name: of the data set in TFDS, cifar10 or cifar100.
      content: the data.
      data_dir: folder of data sets; the result appears in it whole or not at all.
      staging: an empty folder on the same file system.
      show_progress: whether to show a progress bar where stderr is a terminal.

    Returns:
      The folder of the version.

    Raises:
      UserError: the result cannot be written, or something else is in its place.
    """
    # Takes a few tenths of a second to import; `import resnet_flax` should not.
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    total = sum(len(images) for images in content.images.values())
    free = shutil.disk_usage(staging).free
    if free < total * _BYTES_PER_EXAMPLE:
        raise UserError(
            f"{data_dir} has {free // 10**6} MB free; "
            f"preparing {name} takes {total * _BYTES_PER_EXAMPLE // 10**6} MB"
        )
    bar = tqdm(
        total=total,
        desc=f"Preparing {name}",
        unit=" images",
        disable=None if show_progress else True,  # None: shown only where stderr is a terminal.
    )
    try:
        with bar, _quiet_tfds():
            builder = _builder_class(name, content=content, tick=bar.update)(data_dir=staging)
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


def _builder_class(name: str, *, content: archive.Content, tick: Callable[[], object]) -> type:
    """Returns a subclass of TFDS's builder that takes its examples from `content`.

    `tick` is called after each of them.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    base = tfds.builder_cls(name)
    stock_name = name  # The class body below has a `name` of its own.

    def encoded(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        return buffer.getvalue()

    def examples(split: str) -> Iterator[tuple[int, dict]]:
        labels = content.labels[split]
        # The integer keys and the ids are TFDS's: its shuffle is seeded with the keys.
        for index, image in enumerate(content.images[split]):
            record = {key: int(values[index]) for key, values in labels.items()}
            yield index, {"id": f"{split}_{index:05d}", "image": encoded(image), **record}
            tick()

    class Prepared(base, skip_registration=True):
        """TFDS's builder, without TensorFlow and without network."""

        name = stock_name

        def _split_generators(self, dl_manager):
            for key, names in content.names.items():
                self.info.features[key].names = list(names)
            return {split: examples(split) for split in content.images}

        def _log_download_bytes(self):
            """Says nothing: TFDS prints the size to download, and nothing is downloaded."""

        def _log_download_done(self):
            """Says nothing: TFDS prints the folder, which is about to be renamed."""

    # It goes into the metadata as the place of the code that can read the data set.
    Prepared.__module__ = base.__module__
    return Prepared
