"""Batches of streamed images, decoded ahead of their use."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from resnet_flax.data import stream
from resnet_flax.data.streamed import StreamedSplit, why_unreadable
from resnet_flax.errors import UserError

# Stands in for the label where there is no example, and where its image cannot be read.
PADDING, UNREADABLE = -1, -2


class Batches:
    """Batches by number, the same whoever decodes them: a pure function of (seed, number).

    Each is a dict of `images` uint8 [R, H, W, C], `labels` int32 [R], where R is the number of
    `rows`, and `unreadable` int32 [n]: the examples that were passed over.
    """

    def __init__(self, split: StreamedSplit, rows: np.ndarray, limit: int):
        """Batches of which only `rows`, positions in the batch, are wanted here.

        Args:
          split: the examples.
          rows: int [R].
          limit: how many unreadable images in a row are passed over.
        """
        self.split, self.rows, self.limit = split, rows, limit

    def __len__(self) -> int:
        raise NotImplementedError

    def _collect(self, found) -> dict[str, np.ndarray]:
        pixels = np.empty((len(self.rows), *self.split.image_shape), np.uint8)
        labels = np.empty(len(self.rows), np.int32)
        unreadable: list[int] = []
        for row, (image, label, passed_over) in enumerate(found):
            pixels[row], labels[row] = image, label
            unreadable += passed_over
        return {
            "images": pixels,
            "labels": labels,
            "unreadable": np.array(unreadable, np.int32),
        }

    def _to_learn_from(self, index: int, random: np.random.RandomState):
        """An example or, where its image cannot be read, the next one that can."""
        unreadable: list[int] = []
        for candidate in range(index, index + len(self.split)):
            candidate %= len(self.split)
            try:
                image, label = self.split.example(candidate, random)
            except (OSError, ValueError):
                unreadable.append(candidate)
                if len(unreadable) > self.limit:
                    break
                continue
            return image, label, unreadable
        name = self.split.name(unreadable[0])
        reason = why_unreadable(self.split, unreadable[0])
        raise UserError(
            f"{len(unreadable)} images in a row cannot be read (config.data.max_unreadable="
            f"{self.limit}), the first is {name}: {reason}"
        )

    def _to_score(self, index: int):
        """An example, or a blank image with the label that says why."""
        if index == PADDING:
            return np.zeros(self.split.image_shape, np.uint8), PADDING, []
        try:
            return *self.split.example(index, None), []
        except (OSError, ValueError):
            return np.zeros(self.split.image_shape, np.uint8), UNREADABLE, [index]


class TrainBatches(Batches):
    """The batches of training steps, in the order of `stream.indices`."""

    def __init__(
        self,
        split: StreamedSplit,
        rows: np.ndarray,
        limit: int,
        *,
        seed: int,
        batch_size: int,
        first: int,
        last: int,
    ):
        """The batches of steps `first` to `last - 1`."""
        super().__init__(split, rows, limit)
        self.seed, self.batch_size, self.first, self.last = seed, batch_size, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        step = self.first + number
        index = stream.indices(self.seed, step, 1, self.batch_size, len(self.split))[0]
        places = (step * self.batch_size + self.rows).tolist()
        # Of the place in the stream, not of the image: each epoch cuts out another part.
        draws = (np.random.RandomState([self.seed, p % 2**32, p >> 32]) for p in places)
        return self._collect(map(self._to_learn_from, index[self.rows].tolist(), draws))


class OrderedBatches(Batches):
    """The batches of an evaluation: `index` int [k, B], `PADDING` where there is no example.

    Of a split that is cut centrally every example comes once, with the label `UNREADABLE` where its
    image cannot be read; of one to learn from, the next one takes its place.
    """

    def __init__(
        self, split: StreamedSplit, rows: np.ndarray, limit: int, *, index: np.ndarray, seed: int
    ):
        """The batches of the rows of `index`; `seed` draws the parts that are not central."""
        super().__init__(split, rows, limit)
        self.index, self.seed = index, seed

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        chosen = self.index[number][self.rows].tolist()
        if self.split.crops.central:
            return self._collect(map(self._to_score, chosen))
        draws = (np.random.RandomState([self.seed, number, r, 1]) for r in self.rows.tolist())
        return self._collect(map(self._to_learn_from, chosen, draws))


def read_ahead(batches: Batches, workers: int) -> Iterator[dict[str, Any]]:
    """Yields `batches` in order; has a `close` method.

    Args:
      batches: to read.
      workers: processes that decode, each a batch at a time; 0: threads of this process.

    The order does not depend on the number of workers.
    """
    # Takes a second to import, and data sets that fit in memory do without.
    import grain

    if not flags.FLAGS.is_parsed():  # Used as a library; grain reads flags of its own.
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(batches)
    if not workers:
        threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        return iter(dataset.to_iter_dataset(threads))
    workers = min(workers, len(batches))
    single = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(
        dataset.to_iter_dataset(single).mp_prefetch(processes, worker_init_fn=_begin_worker)
    )


def _begin_worker(number: int, count: int) -> None:
    """Signals are the main process's business, and a worker must not outlive it."""
    del number, count
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
