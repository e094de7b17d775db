"""Scores of a net: every example counted exactly once, whatever the batch size."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from resnet_flax import sharding


@dataclasses.dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
      loss: mean cross-entropy, nats.
      confusion: int64 [K, K], examples by (label, prediction).
    """

    loss: float
    confusion: np.ndarray

    @property
    def examples(self) -> int:
        """Number of examples scored."""
        return int(self.confusion.sum())

    @property
    def wrong(self) -> int:
        """Number of examples misclassified."""
        return self.examples - int(np.trace(self.confusion))

    @property
    def error(self) -> float:
        """Share of examples misclassified, 0 to 1."""
        return self.wrong / self.examples

    def class_errors(self) -> np.ndarray:
        """Share misclassified of each class, float64 [K]; nan for a class without examples."""
        total = self.confusion.sum(axis=1)
        return 1 - np.divide(
            np.diag(self.confusion), total, out=np.full(len(total), np.nan), where=total > 0
        )


def batches(count: int, batch_size: int) -> np.ndarray:
    """Positions 0 to count - 1 in rows: int32 [ceil(count / batch_size), batch_size], -1 after."""
    rows = -(-count // batch_size)
    index = np.full(rows * batch_size, -1, np.int32)
    index[:count] = np.arange(count)
    return index.reshape(rows, batch_size)


def evaluate(
    eval_chunk: Callable,
    variables: Any,
    resident: dict[str, jax.Array],
    *,
    batch_size: int,
    split: NamedSharding,
) -> Score:
    """Scores all examples of `resident`.

    Args:
      eval_chunk: from `steps.make_eval_chunk`.
      variables: `{"params": …, "batch_stats": …}`.
      resident: the data, see `steps`.
      batch_size: examples per batch; rounded up to a multiple of the devices.
      split: sharding of indices [k, B] over B.

    Raises:
      RuntimeError: an example was lost or counted twice (a bug, never the user's fault).
    """
    count = resident["labels"].shape[0]
    devices = split.mesh.size
    index = batches(count, -(-min(batch_size, count) // devices) * devices)
    # One dispatch for all on accelerators; on a CPU loops are slow (see steps.make_train_chunk).
    chunks = index[:, None] if jax.default_backend() == "cpu" else index[None]
    sums = [eval_chunk(variables, resident, sharding.put(chunk, split)) for chunk in chunks]
    sums = jax.device_get(sums)
    confusion = np.sum([s["confusion"] for s in sums], axis=0, dtype=np.int64)
    if confusion.sum() != count:
        raise RuntimeError(f"scored {confusion.sum()} examples of {count}")
    return Score(float(np.sum([s["loss"] for s in sums], dtype=np.float64)) / count, confusion)


def reestimate_statistics(
    batch_statistics: Callable,
    variables: Any,
    resident: dict[str, jax.Array],
    *,
    examples: int,
    batch_size: int,
    split: NamedSharding,
) -> Any:
    """`variables` with batch-norm statistics averaged over training batches.

    Args:
      batch_statistics: from `steps.make_batch_statistics`.
      variables: `{"params": …, "batch_stats": …}`.
      resident: the training data, see `steps`.
      examples: how many training examples, in whole batches, evenly spread over the data.
      batch_size: examples per batch, the training one.
      split: sharding of an index [B].
    """
    size = resident["labels"].shape[0]
    rows = max(1, min(examples, size) // batch_size)
    index = np.linspace(0, size, rows * batch_size, endpoint=False).astype(np.int32)
    # Row r holds every rows-th example: the order of the data may follow its classes.
    index = index.reshape(batch_size, rows).T
    total = None
    for draw, row in enumerate(np.ascontiguousarray(index)):
        new = batch_statistics(variables, resident, sharding.put(row, split), np.int32(draw))
        total = new if total is None else jax.tree.map(jax.numpy.add, total, new)
    mean = jax.tree.map(lambda x: x / rows, total)
    return {"params": variables["params"], "batch_stats": mean}
