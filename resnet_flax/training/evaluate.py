"""Scores of a net: every example counted exactly once, whatever the batch size."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from resnet_flax.errors import UserError
from resnet_flax.training.feed import Feed

MANY_CLASSES = 100
"""From here on the top-5 error says more than a table of every class."""

# Chunks that wait to be scored; a fast decoder would fill a slow device with more.
_SENT_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Score:
    """The result of an evaluation."""

    loss: float  # mean cross-entropy, nats
    confusion: np.ndarray  # int64 [K, K], examples by (label, prediction)
    top5_wrong: int  # examples whose label is none of the five likeliest classes
    unreadable: int = 0  # examples whose images cannot be read, counted in nothing else

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
        """Fraction of the examples misclassified."""
        return self.wrong / self.examples

    @property
    def top5_error(self) -> float:
        """`top5_wrong` as a fraction of the examples."""
        return self.top5_wrong / self.examples

    def class_errors(self) -> np.ndarray:
        """Fraction misclassified of each class, float64 [K]; nan for a class without examples."""
        with np.errstate(invalid="ignore"):
            return 1 - np.diag(self.confusion) / self.confusion.sum(axis=1)

    def as_record(self) -> dict[str, Any]:
        """Plain values for a log: loss, error, counts, and the classes' or the top-5 error."""
        record = {
            "loss": self.loss,
            "error": self.error,
            "wrong": self.wrong,
            "examples": self.examples,
        }
        if self.unreadable:
            record["unreadable"] = self.unreadable
        if len(self.confusion) < MANY_CLASSES:
            errors = self.class_errors()
            record["class_errors"] = [None if np.isnan(e) else round(float(e), 6) for e in errors]
        else:
            record["top5_error"] = self.top5_error
        return record


def evaluate(
    eval_chunk: Callable,
    variables: Any,
    feed: Feed,
    *,
    batch_size: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Scores all examples of `feed`; None if `stopped()`, asked before each batch, returns True.

    `eval_chunk` is from `steps.make_eval_chunk`, `variables` are `{"params": …, "batch_stats": …}`;
    `batch_size` is rounded up to a multiple of the devices.

    Raises:
      UserError: too many images cannot be read, or none can.
      RuntimeError: an example was lost or counted twice (a bug, never the user's fault).
    """
    total: dict[str, Any] = {}
    waiting: collections.deque = collections.deque()

    def add() -> None:
        for name, value in jax.device_get(waiting.popleft()).items():
            wide = np.float64 if name == "loss" else np.int64
            total[name] = total.get(name, 0) + np.asarray(value, wide)

    for batches in feed.batches(batch_size):
        if stopped():
            return None
        waiting.append(eval_chunk(variables, feed.resident, batches))
        if len(waiting) > _SENT_AHEAD:
            add()
    while waiting:
        add()
    scored, unreadable = int(total["confusion"].sum()), int(total["unreadable"])
    if scored + unreadable != feed.size:
        raise RuntimeError(f"scored {scored} examples of {feed.size}, {unreadable} are unreadable")
    if not scored:
        raise UserError(f"none of {feed.size} images to be scored can be read")
    loss = float(total["loss"]) / scored
    return Score(loss, total["confusion"], int(total["top5_wrong"]), unreadable)


def reestimate_statistics(
    batch_statistics: Callable, variables: Any, feed: Feed, *, examples: int, batch_size: int
) -> Any:
    """`variables` with batch-norm statistics averaged over training batches.

    The batches hold about `examples` examples, evenly spaced in `feed`; `batch_statistics` is from
    `steps.make_batch_statistics`.
    """
    total, count = None, 0
    for batch in feed.spread(examples, batch_size):
        new = batch_statistics(variables, feed.resident, batch, np.int32(count))
        total = new if total is None else jax.tree.map(jax.numpy.add, total, new)
        count += 1
    mean = jax.tree.map(lambda x: x / count, total)
    return {"params": variables["params"], "batch_stats": mean}
