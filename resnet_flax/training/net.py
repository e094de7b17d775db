"""One net in training: its state, its log, its checkpoints, and its result."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from resnet_flax.config import flatten
from resnet_flax.devices import distributed
from resnet_flax.runs import checkpoint, result
from resnet_flax.runs.metrics import Log, RunLog
from resnet_flax.runs.weights import Weights
from resnet_flax.training.evaluate import Score
from resnet_flax.training.setup import Setup
from resnet_flax.training.state import TrainState


@dataclasses.dataclass
class History:
    """What a checkpoint remembers beside the state.

    Attributes:
      seconds: wall-clock time that led to this state, with evaluations and compilation, without
        start-up and work that a crash undid.
      train_seconds: the part spent on training steps, without compilation.
      train_examples: examples trained on in `train_seconds`.
      window: sums since the last training record: steps, loss, error, seconds.
    """

    seconds: float = 0.0
    train_seconds: float = 0.0
    train_examples: int = 0
    window: tuple[int, float, float, float] = (0, 0.0, 0.0, 0.0)

    @classmethod
    def from_record(cls, saved: dict[str, Any]) -> "History":
        """The history in a checkpoint's record; what an older version did not keep starts anew."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in saved.items() if k in known})


class Net:
    """One net in training, with the files of its run.

    Attributes:
      setup: of the net.
      directory: of the run.
      state: on the devices.
      step: steps dispatched.
      log: its records.
      rate: learning rate of the last step.
      saved: path of the newest checkpoint, None before the first.
      scores: of the last evaluation in this process, by split.
    """

    def __init__(
        self,
        setup: Setup,
        directory: pathlib.Path,
        state: TrainState,
        checkpoints: epath.Path,
        identity: dict[str, Any],
        record: dict[str, Any] | None,
    ):
        """Opens the log and the checkpoints of a run that goes on from `state`.

        `identity` is kept in each checkpoint, see `Directory.check_checkpoint`; `record` is the one
        of the checkpoint that the state is from, None for a new run.
        """
        self.setup, self.directory, self.state = setup, directory, state
        self.step = int(jax.device_get(state.step))
        self.rate = math.nan
        self.saved = checkpoints / str(self.step) if record is not None else None
        self._checkpoints, self._identity = checkpoints, identity
        self._history = History.from_record(record or {})
        self.scores: dict[str, Score] = {}
        self._evaluated: Any = None
        config = setup.config
        self._writer = None
        if distributed.is_first():
            self.log: Log = RunLog(directory, self.step, config.log.tensorboard)
            distributed.share(lambda: self.log.records)
            self._writer = checkpoint.Writer(checkpoints, config.checkpoint.keep)
        else:
            self.log = Log(distributed.share(list))

    def read(self, first: int, sums: dict[str, np.ndarray], seconds: float) -> str | None:
        """Logs a chunk after `first` steps; returns what is wrong if a loss is not finite.

        `sums` holds "loss", "error" and "rate" of each step; the chunk took `seconds`.
        """
        config, history, length = self.setup.config, self._history, len(sums["loss"])
        history.train_seconds += seconds
        history.train_examples += length * config.data.batch_size
        each = zip(*(sums[name].tolist() for name in ("loss", "error", "rate")), strict=True)
        for step, (loss, error, self.rate) in enumerate(each, first + 1):
            if not math.isfinite(loss):
                return f"the loss is {loss} at step {step}"
            values = 1, loss, error, seconds / length
            history.window = tuple(a + b for a, b in zip(history.window, values, strict=True))
            if step % config.log.every_steps == 0 or step == config.train.total_steps:
                self._log_window(step)
        return None

    def _log_window(self, step: int) -> None:
        steps, loss, error, seconds = self._history.window
        self._history.window = 0, 0.0, 0.0, 0.0
        examples = steps * self.setup.config.data.batch_size
        values = {
            "loss": loss / steps,
            "error": error / steps,
            "rate": self.rate,
            "examples": examples,
            "images_per_second": round(examples / max(seconds, 1e-9), 1),
        }
        self.log.write("train", step, values)

    def images_per_second(self) -> float:
        """Training examples by the time spent on training steps."""
        return self._history.train_examples / max(self._history.train_seconds, 1e-9)

    def tick(self, seconds: float) -> None:
        """Adds to the run's wall-clock time."""
        self._history.seconds += seconds

    def best_step(self) -> int | None:
        """Step of the best evaluation so far; on the test split only without a validation split."""
        split = "validation" if self.setup.dataset.validation is not None else "test"
        best = result.best(self.log.records, split)
        return best and best["step"]

    def score(self, stopped: Callable[[], bool]) -> dict[str, Score]:
        """Evaluates the net and logs its scores; {} if it was stopped."""
        self._evaluated = self.setup.evaluated(self.state.evaluated())
        self.scores = self.setup.score(self._evaluated, stopped)
        for split, score in self.scores.items():
            self.log.write(split, self.step, score.as_record())
        return self.scores

    def save(self) -> None:
        """Begins to save a checkpoint of this step, unless there is one: see `Writer.save`."""
        self.log.sync()
        is_there = self.saved is not None and self.saved.name == str(self.step)
        if self._writer:
            self._writer.best_step = self.best_step()
            record = {**dataclasses.asdict(self._history), "run": self._identity}
            if not is_there:
                self._writer.save(self.step, checkpoint.to_tree(self.state), record)
        self.saved = self._checkpoints / str(self.step)

    def wait(self) -> None:
        """Blocks until the checkpoint under way is on disk."""
        if self._writer:
            self._writer.wait()

    def close(self) -> None:
        """Closes the log and the checkpoints, and ends what works in the background."""
        with contextlib.ExitStack() as stack:
            for part in filter(None, (self.log, self._writer, self.setup)):
                stack.callback(part.close)

    def write_result(self, environment: dict[str, Any]) -> dict[str, Any]:
        """Writes what a finished run leaves, see `result.write`; the last step must be scored."""
        setup, test = self.setup, self.scores["test"]
        weights = Weights(
            model=setup.describe_model(),
            variables=self._evaluated,
            mean=setup.mean,
            std=setup.std,
            class_names=setup.dataset.class_names,
            training={"config": flatten(setup.config)},
        )
        return result.write(
            self.directory,
            weights,
            test.as_record(),
            self.log.records,
            confusion=test.confusion.tolist(),
            facts={
                "data": setup.dataset.name,
                "seed": setup.config.seed,
                "steps": setup.config.train.total_steps,
            },
            epoch=len(setup.dataset.train),
            costs={
                # Time that a crash undid does not count.
                "seconds": round(self._history.seconds, 2),
                "images_per_second": round(self.images_per_second(), 1),
                **environment,
            },
        )
