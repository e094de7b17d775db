"""What the compiled functions are fed with, step by step, whatever holds the data.

Two kinds with one face: `ResidentFeed` for a data set that lies on the devices, to which the host
sends positions, and `StreamedFeed` for one that is decoded as it is needed. Both have

  resident: what stays on the devices, see `steps`.
  size: number of examples.
  default_chunk: steps worth dispatching at once on an accelerator.
  chunk(step, count): what `steps.make_train_chunk` takes for `count` steps from `step` on.
  batches(batch_size): what `steps.make_eval_chunk` takes, every example once.
  spread(examples, batch_size): batches for `steps.make_batch_statistics`.
  close(): ends what works in the background.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from resnet_flax.data import batches as streaming
from resnet_flax.data import stream
from resnet_flax.data.dataset import Part, Split
from resnet_flax.data.streamed import StreamedSplit, why_unreadable
from resnet_flax.devices import randomness, sharding
from resnet_flax.errors import UserError


def _statistics(mean: np.ndarray, std: np.ndarray, seed: int, mesh: Mesh) -> dict[str, jax.Array]:
    everywhere = sharding.replicated(mesh)
    make_key = functools.partial(randomness.make_key, seed)
    return {
        "mean": sharding.put(mean, everywhere),
        "std": sharding.put(std, everywhere),
        "key": jax.jit(make_key, out_shardings=everywhere)(),
    }


def padded_rows(count: int, batch_size: int, devices: int) -> np.ndarray:
    """Positions 0 to count - 1 in rows: int32 [k, B], -1 after the last; devices divide B."""
    batch_size = -(-min(batch_size, count) // devices) * devices
    rows = -(-count // batch_size)
    index = np.full(rows * batch_size, streaming.PADDING, np.int32)
    index[:count] = np.arange(count)
    return index.reshape(rows, batch_size)


def _spread(size: int, examples: int, batch_size: int) -> np.ndarray:
    """Positions of about `examples` examples, evenly spaced: int32 [k, batch_size]."""
    rows = max(1, min(examples, size) // batch_size)
    index = np.linspace(0, size, rows * batch_size, endpoint=False).astype(np.int32)
    # Row r holds every rows-th example: the order of the data may follow its classes.
    return np.ascontiguousarray(index.reshape(batch_size, rows).T)


def put_once() -> Callable[[np.ndarray, NamedSharding], jax.Array]:
    """A `sharding.put` that places each array once, however many feeds ask for it."""
    placed: dict[tuple, tuple[np.ndarray, jax.Array]] = {}

    def put(value: np.ndarray, where: NamedSharding) -> jax.Array:
        key = value.ctypes.data, value.shape, where
        if key not in placed:
            # Kept with its value: else another could come to have its address.
            placed[key] = value, sharding.put(value, where)
        return placed[key][1]

    return put


class ResidentFeed:
    """Feeds positions in a data set that lies on every device."""

    default_chunk = 100

    def __init__(
        self,
        split: Split | Part,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        seed: int,
        mesh: Mesh,
        batch_size: int,
        put: Callable[[np.ndarray, NamedSharding], jax.Array] = sharding.put,
    ):
        """Puts the data on the devices.

        Args:
          split: the examples.
          mean: see `augment.statistics`.
          std: likewise.
          seed: of their order and augmentation.
          mesh: of all devices.
          batch_size: examples a training step.
          put: places images and labels, see `put_once`.
        """
        self.size, self._seed, self._mesh, self._batch = len(split), seed, mesh, batch_size
        everywhere = sharding.replicated(mesh)
        # Of a part the whole lies there: other parts of it may be fed too.
        self._part = split.positions if isinstance(split, Part) else None
        whole = split.whole if isinstance(split, Part) else split
        mean = np.broadcast_to(mean, whole.image_shape)
        self.resident = _statistics(mean, std, seed, mesh) | {
            "images": put(whole.images.reshape(len(whole), -1), everywhere),
            "labels": put(whole.labels, everywhere),
        }

    def positions(self, step: int, count: int) -> np.ndarray:
        """Positions of the examples of `count` steps: int32 [count, B]."""
        index = stream.indices(self._seed, step, count, self._batch, self.size)
        return self._in_whole(index)

    def _in_whole(self, index: np.ndarray) -> np.ndarray:
        if self._part is None:
            return index
        return np.where(index < 0, index, self._part[index])

    def chunk(self, step: int, count: int) -> jax.Array:
        """The same on the devices."""
        return sharding.put(self.positions(step, count), sharding.split(self._mesh, 1))

    def batches(self, batch_size: int) -> Iterator[jax.Array]:
        """Positions of all examples: int32 [k, B], -1 for none."""
        index = self._in_whole(padded_rows(self.size, batch_size, self._mesh.size))
        # One dispatch for all on accelerators; a CPU gains nothing by it (see steps).
        on_cpu = sharding.platform(self._mesh) == "cpu"
        for chunk in index[:, None] if on_cpu else index[None]:
            yield sharding.put(chunk, sharding.split(self._mesh, 1))

    def spread(self, examples: int, batch_size: int) -> Iterator[jax.Array]:
        """Positions of evenly spaced examples: int32 [B] each."""
        for row in self._in_whole(_spread(self.size, examples, batch_size)):
            yield sharding.put(row, sharding.split(self._mesh))

    def close(self) -> None:
        """Nothing to end."""


class StreamedFeed:
    """Feeds decoded images: a dict of `images` uint8 [k, B, H, W, C] and `labels` int32 [k, B].

    Each process decodes the examples of its own devices only.
    """

    default_chunk = 1

    def __init__(
        self,
        split: StreamedSplit,
        mean: np.ndarray,
        std: np.ndarray,
        *,
        seed: int,
        mesh: Mesh,
        batch_size: int,
        total_steps: int,
        workers: int,
        limit: int,
        warn: Callable[[str], None],
    ):
        """Begins nothing yet.

        Args:
          split: the examples.
          mean: see `augment.statistics`.
          std: likewise.
          seed: of their order and augmentation.
          mesh: of all devices.
          batch_size: examples a training step.
          total_steps: where the stream of training steps ends.
          workers: processes that decode; 0: threads of this one.
          limit: how many unreadable images are passed over.
          warn: told of each of them.
        """
        self.size, self.resident = len(split), _statistics(mean, std, seed, mesh)
        self._split, self._seed, self._mesh, self._batch = split, seed, mesh, batch_size
        self._total, self._workers, self._limit, self._warn = total_steps, workers, limit, warn
        self._unreadable: set[int] = set()
        self._ahead: Any = None
        self._next = -1

    def chunk(self, step: int, count: int) -> dict[str, jax.Array]:
        """The examples of `count` steps."""
        split = sharding.split(self._mesh, 1)
        rows = sharding.rows_here(split, 1, self._batch)
        if self._next != step:
            self.close()
            ordered = streaming.TrainBatches(
                self._split,
                rows,
                self._limit,
                seed=self._seed,
                batch_size=self._batch,
                first=step,
                last=self._total,
            )
            self._ahead = streaming.read_ahead(ordered, self._workers)
        parts = [self._take(self._ahead) for _ in range(count)]
        self._next = step + count
        return self._put(parts, rows, self._batch)

    def batches(self, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        """All examples, in order."""
        yield from self._ordered(padded_rows(self.size, batch_size, self._mesh.size))

    def spread(self, examples: int, batch_size: int) -> Iterator[dict[str, jax.Array]]:
        """Evenly spaced examples, as they are trained on but for mirroring."""
        for part in self._ordered(_spread(self.size, examples, batch_size)):
            yield jax.tree.map(lambda x: x[0], part)

    def _ordered(self, index: np.ndarray) -> Iterator[dict[str, jax.Array]]:
        rows = sharding.rows_here(sharding.split(self._mesh, 1), 1, index.shape[1])
        ordered = streaming.OrderedBatches(
            self._split, rows, self._limit, index=index, seed=self._seed
        )
        ahead = streaming.read_ahead(ordered, self._workers)
        try:
            for _ in index:
                yield self._put([self._take(ahead)], rows, index.shape[1])
        finally:
            ahead.close()
            del ahead
            gc.collect()  # See `close`.

    def _take(self, ahead) -> dict[str, np.ndarray]:
        """The next batch; names each unreadable image once, and too many of them are an error."""
        try:
            part = next(ahead)
        except UserError as error:
            # Grain adds lines of its own to what a worker raises.
            raise UserError(str(error).partition("\n")[0]) from error
        except RuntimeError as error:
            raise UserError(
                f"a process that decodes images ended ({str(error).partition(chr(10))[0]}); out of "
                "memory? Then lower config.data.workers"
            ) from error
        for index in part.pop("unreadable").tolist():
            if index in self._unreadable:
                continue
            self._unreadable.add(index)
            name, reason = self._split.name(index), why_unreadable(self._split, index)
            said = f"image {len(self._unreadable)} that cannot be read: {name} ({reason})"
            if len(self._unreadable) > self._limit:
                raise UserError(
                    f"{said}; more than config.data.max_unreadable={self._limit}: mend or remove "
                    "them, or raise the limit"
                )
            self._warn(f"{said}; passed over")
        return part

    def _put(self, parts: list[dict], rows: np.ndarray, batch_size: int) -> dict[str, jax.Array]:
        by_batch, placed = sharding.split(self._mesh, 1), {}
        for name, first in parts[0].items():
            together = np.empty((len(parts), *first.shape), first.dtype)
            for i, part in enumerate(parts):
                together[i] = part[name]
            placed[name] = sharding.put_rows(together, rows, batch_size, by_batch)
        return placed

    def close(self) -> None:
        """Ends the workers."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead, self._next = None, -1
            gc.collect()  # The iterator is part of cycles, and has threads and processes.


Feed = ResidentFeed | StreamedFeed


def chunk_steps(examples: Feed, requested: int, platform: str) -> int:
    """Steps to dispatch at once: `requested`, or where that is 0 as many as pay on a platform."""
    return requested or (1 if platform == "cpu" else examples.default_chunk)
