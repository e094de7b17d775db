"""Data sets too large for memory: images are decoded and cropped ahead of their use."""

import dataclasses
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from absl import flags

from resnet_flax.data import images, order
from resnet_flax.errors import UserError, first_line

PADDING, UNREADABLE = -1, -2
"""Labels of rows without an example, and of rows whose image cannot be read."""


class Source(Protocol):
    """N encoded images; picklable, as each worker process gets a copy."""

    labels: np.ndarray  # int32 [N]; may take a while

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, int]:
        """Content of an image file, and its label; raises OSError."""

    def name(self, index: int) -> str:
        """The image's name in messages."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How examples are cut out of images, in pixels.

    To train on, an image's shorter side is resized to a number drawn from `short_sides`, both ends
    included, and a square is cut out at random: "scale augmentation" [R §3.4]. To evaluate, it is
    resized to `eval_short_side`, and the central square is taken.
    """

    size: int  # side of the square
    short_sides: tuple[int, int]
    eval_size: int  # more than `size` where the evaluation cuts its own crops
    eval_short_side: int


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """The examples of one split, on disk."""

    source: Source
    positions: np.ndarray  # int64 [N], of the examples in the source
    geometry: Geometry
    central: bool = False  # cut out as to evaluate

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]; may take a while."""
        return self.source.labels[self.positions]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        size = self.geometry.eval_size if self.central else self.geometry.size
        return size, size, 3

    def divide(self, kept: np.ndarray, drawn: np.ndarray) -> tuple["StreamedSplit", ...]:
        """The examples at `kept`, to train on, and at `drawn`, to validate on."""
        train, validation = self.positions[kept], self.positions[drawn]
        return (
            dataclasses.replace(self, positions=train),
            dataclasses.replace(self, positions=validation, central=True),
        )

    def name(self, index: int) -> str:  # noqa: D102
        return self.source.name(int(self.positions[index]))

    def example(self, index: int, random: np.random.RandomState | None) -> tuple[np.ndarray, int]:
        """Returns uint8 [H, W, C] and the label; `random` draws a crop that is not central.

        Raises:
          OSError, ValueError: the image cannot be read or decoded.
        """
        content, label = self.source.read(int(self.positions[index]))
        side = self.geometry.eval_short_side if self.central else self.geometry.short_sides[1]
        image, size = images.decode(content, at_least=(side, side)), self.image_shape[0]
        if self.central:
            box = images.central_box(*image.size, short_side=side, size=size)
        else:
            sides = self.geometry.short_sides
            box = images.random_box(random, *image.size, short_sides=sides, size=size)
        return images.crop_resized(image, box, size), label


def whole(source: Source, geometry: Geometry, central: bool) -> StreamedSplit:
    """All examples of a source."""
    return StreamedSplit(source, np.arange(len(source)), geometry, central)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches by number: a pure function of (seed, number), whichever process decodes them.

    A batch is a dict of `images` uint8 [R, H, W, C], `labels` int32 [R], and `unreadable`: the
    (index, reason) of each example that was passed over.
    """

    split: StreamedSplit
    rows: np.ndarray  # int [R], positions in the batch that are wanted in this process
    limit: int  # the most unreadable images in a row
    seed: int  # of crops that are not central

    def __getitem__(self, number: int) -> dict[str, Any]:
        unreadable: list[tuple[int, str]] = []
        # A subclass chooses the index and the randomness of each example.
        found = [self._read(*chosen, unreadable) for chosen in self._choose(number)]
        pixels, labels = zip(*found, strict=True)
        labels = np.array(labels, np.int32)
        return {"images": np.stack(pixels), "labels": labels, "unreadable": unreadable}

    def _read(self, index: int, random, unreadable: list) -> tuple[np.ndarray, int]:
        """An example; where it cannot be read, a blank one or, in training, the next that can."""
        blank = np.zeros(self.split.image_shape, np.uint8)
        if index == PADDING:
            return blank, PADDING
        before = len(unreadable)
        for candidate in range(index, index + len(self.split)):
            candidate %= len(self.split)
            try:
                return self.split.example(candidate, random)
            except (OSError, ValueError) as error:
                unreadable.append((candidate, first_line(error)))
            if self.split.central:
                return blank, UNREADABLE
            if len(unreadable) - before > self.limit:
                break
        first, reason = unreadable[before]
        raise UserError(
            f"{len(unreadable) - before} images in a row cannot be read "
            f"(config.data.max_unreadable={self.limit}), the first is "
            f"{self.split.name(first)}: {reason}"
        )


@dataclasses.dataclass(frozen=True)
class TrainBatches(Batches):
    """The batches of training steps `first` to `last - 1`, in the order of `order.indices`."""

    batch_size: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def _choose(self, number):
        step = self.first + number
        index = order.indices(self.seed, step, 1, self.batch_size, len(self.split))[0]
        for row in self.rows.tolist():
            # Of the place in the stream, not of the image: each epoch cuts out another part.
            place = step * self.batch_size + row
            yield int(index[row]), np.random.RandomState([self.seed, place % 2**32, place >> 32])


@dataclasses.dataclass(frozen=True)
class OrderedBatches(Batches):
    """The batches of an evaluation: `index` int [k, B], `PADDING` where there is no example."""

    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def _choose(self, number):
        for row in self.rows.tolist():
            yield int(self.index[number, row]), np.random.RandomState([self.seed, number, row, 1])


def central_sample(split: StreamedSplit, most: int) -> np.ndarray:
    """Central crops of up to `most` evenly spaced examples: uint8 [n, size, size, 3]."""
    size, low = split.geometry.size, split.geometry.short_sides[0]
    geometry = Geometry(size, (low, low), size, low)
    split = dataclasses.replace(split, geometry=geometry, central=True)
    index = np.linspace(0, len(split), min(most, len(split)), endpoint=False).astype(np.int64)
    sample = OrderedBatches(split, np.arange(len(index)), 0, 0, index[None])[0]
    if len(sample["unreadable"]) == len(index):
        first, reason = sample["unreadable"][0]
        raise UserError(
            f"none of {len(index)} training images can be read; {split.name(first)}: {reason}"
        )
    return sample["images"][sample["labels"] != UNREADABLE]


def read_ahead(batches: Batches, workers: int) -> Iterator[dict[str, Any]]:
    """Yields `batches` in order; `close` ends the workers early.

    `workers` processes decode, each a batch at a time, or, if 0, threads of this process.

    Raises:
      UserError: too many images in a row cannot be read, or a worker died.
    """
    # Takes a second to import, and data sets in memory do without.
    import grain

    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; a library user parses none.
        flags.FLAGS.mark_as_parsed()
    each = 1 if workers else 2  # threads and batches ahead, of each process
    options = grain.ReadOptions(num_threads=each, prefetch_buffer_size=each)
    ahead = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        count = min(workers, len(batches))
        processes = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=2)
        ahead = ahead.mp_prefetch(processes, worker_init_fn=_begin_worker)
    iterator = iter(ahead)
    try:
        yield from iterator
    except UserError as error:  # Grain adds lines of its own to what a worker raises.
        raise UserError(str(error).partition("\n")[0]) from error
    except RuntimeError as error:
        raise UserError(
            f"a process that decodes images ended ({first_line(error)}); out of memory? Then "
            "lower config.data.workers"
        ) from error
    finally:
        iterator.close()
        del iterator
        gc.collect()  # The iterator is part of cycles, and has threads and processes.


def _begin_worker(number: int, count: int) -> None:
    """Leaves signals to the main process, and ends when it does."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
