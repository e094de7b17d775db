"""Feeds: the inputs of the compiled functions in `steps`, wherever the data are."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from resnet_flax.data import order, streaming
from resnet_flax.data.dataset import Part, Split
from resnet_flax.devices import randomness, sharding
from resnet_flax.errors import UserError


@dataclasses.dataclass(eq=False)
class Feed:
    """The examples of a split, as a base class."""

    split: Split | Part | streaming.StreamedSplit
    mean: np.ndarray  # of `augment.statistics`
    std: np.ndarray
    _: dataclasses.KW_ONLY
    seed: int  # of order, crops and augmentation
    mesh: Mesh  # of all devices
    batch_size: int  # examples in a training step

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.split)

    @functools.cached_property
    def resident(self) -> dict[str, jax.Array]:
        """What stays on the devices, see `steps`."""
        everywhere = sharding.replicated(self.mesh)
        make_key = functools.partial(randomness.make_key, self.seed)
        return {
            "mean": sharding.put(self.mean, everywhere),
            "std": sharding.put(self.std, everywhere),
            "key": jax.jit(make_key, out_shardings=everywhere)(),
        }

    def chunk(self, step: int, count: int) -> Any:
        """The batches of `count` training steps from `step` on, see `steps`."""
        raise NotImplementedError

    def batches(self, batch_size: int) -> Iterator[Any]:
        """Chunks of batches for `steps.make_eval_chunk` that hold every example once."""
        return self._in_rows(_padded_rows(self.size, batch_size, self.mesh.size))

    def spread(self, examples: int, batch_size: int) -> Iterator[Any]:
        """Single batches of about `examples` examples in all, evenly spaced."""
        return one_by_one(self._in_rows(_spread(self.size, examples, batch_size)))

    def _in_rows(self, index: np.ndarray) -> Iterator[Any]:
        """The examples at `index`, int32 [k, B], in chunks of one or more of its rows."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the workers."""


@dataclasses.dataclass(eq=False)
class ResidentFeed(Feed):
    """Feeds positions, int32 [k, B], in a data set that every device holds; -1 for no example.

    The whole data set is placed by `put`, also if the split is a `Part` of it: see `put_once`.
    """

    put: Callable[[np.ndarray, NamedSharding], jax.Array] = sharding.put

    def __post_init__(self):
        whole = self.split.whole if isinstance(self.split, Part) else self.split
        self.mean = np.broadcast_to(self.mean, whole.image_shape)
        everywhere = sharding.replicated(self.mesh)
        self.resident |= {
            "images": self.put(whole.images.reshape(len(whole), -1), everywhere),
            "labels": self.put(whole.labels, everywhere),
        }

    def _put_index(self, index: np.ndarray) -> jax.Array:
        if isinstance(self.split, Part):
            index = np.where(index < 0, index, self.split.positions[index])
        return sharding.put(index, sharding.split(self.mesh, 1))

    def chunk(self, step: int, count: int) -> jax.Array:  # noqa: D102
        return self._put_index(order.indices(self.seed, step, count, self.batch_size, self.size))

    def _in_rows(self, index: np.ndarray) -> Iterator[jax.Array]:
        # One dispatch for all on accelerators; a CPU gains nothing by it (see steps).
        on_cpu = sharding.platform(self.mesh) == "cpu"
        yield from map(self._put_index, index[:, None] if on_cpu else index[None])


@dataclasses.dataclass(eq=False)
class StreamedFeed(Feed):
    """Feeds decoded images: a dict of `images` uint8 [k, B, H, W, C] and `labels` int32 [k, B].

    Each process decodes the rows of its own devices only.
    """

    _: dataclasses.KW_ONLY
    total_steps: int  # where the stream of training steps ends
    workers: int  # processes that decode; 0: threads of this one
    limit: int  # how many unreadable images are passed over
    warn: Callable[[str], None]  # called with a line for each of them

    def __post_init__(self):
        self._unreadable: set[int] = set()
        self._ahead, self._next = None, -1

    def chunk(self, step: int, count: int) -> dict[str, jax.Array]:  # noqa: D102
        if self._next != step:
            self.close()
            rows = sharding.rows_here(self.mesh, self.batch_size)
            batches = streaming.TrainBatches(
                self.split, rows, self.limit, self.seed, self.batch_size, step, self.total_steps
            )
            self._ahead = streaming.read_ahead(batches, self.workers)
        parts = [self._check(next(self._ahead)) for _ in range(count)]
        self._next = step + count
        return self._put(parts)

    def close(self) -> None:  # noqa: D102
        if self._ahead is not None:
            self._ahead.close()
            self._ahead, self._next = None, -1

    def _in_rows(self, index: np.ndarray) -> Iterator[dict[str, jax.Array]]:
        rows = sharding.rows_here(self.mesh, index.shape[1])
        batches = streaming.OrderedBatches(self.split, rows, self.limit, self.seed, index)
        with contextlib.closing(streaming.read_ahead(batches, self.workers)) as ahead:
            for batch in ahead:
                yield self._put([self._check(batch)])

    def _check(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Warns of each unreadable image once, up to the limit."""
        for index, reason in batch.pop("unreadable"):
            if index in self._unreadable:
                continue
            self._unreadable.add(index)
            name = self.split.name(index)
            said = f"image {len(self._unreadable)} that cannot be read: {name} ({reason})"
            if len(self._unreadable) > self.limit:
                raise UserError(
                    f"{said}; more than config.data.max_unreadable={self.limit}: mend or remove "
                    "them, or raise the limit"
                )
            self.warn(f"{said}; passed over")
        return batch

    def _put(self, parts: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        # Stacked even if there is one: a worker's arrays lie in memory that it uses again.
        together = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        return sharding.put_rows(self.mesh, together)


def one_by_one(chunks: Iterable[Any]) -> Iterator[Any]:
    """The single batches of chunks."""
    for chunk in chunks:
        for i in range(len(jax.tree.leaves(chunk)[0])):
            yield jax.tree.map(lambda x, i=i: x[i], chunk)


def _padded_rows(count: int, batch_size: int, devices: int) -> np.ndarray:
    """Positions 0 to count - 1 in rows: int32 [k, B], then -1; `devices` divides B."""
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
            # Holds on to the value: another array could take over its address.
            placed[key] = value, sharding.put(value, where)
        return placed[key][1]

    return put


def chunk_steps(examples: Feed, requested: int, platform: str) -> int:
    """Steps to dispatch at once: `requested`, or, if that is 0, what suits the platform."""
    return requested or (100 if isinstance(examples, ResidentFeed) and platform != "cpu" else 1)
