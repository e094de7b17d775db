"""What is kept of one net while it trains: its history, its log, its scores, and its result."""

import dataclasses
import math
import pathlib
from typing import Any

from resnet_flax.runs import record
from resnet_flax.runs.metrics import Records
from resnet_flax.training.evaluate import Score
from resnet_flax.training.experiment import Experiment


@dataclasses.dataclass
class History:
    """What a checkpoint remembers beside the state.

    Attributes:
      seconds: wall-clock that led to this state: evaluations and compilation included, start-up
        and work that a crash undid not.
      train_seconds: the part spent on training steps, compilation not included.
      train_examples: examples trained on in `train_seconds`.
      window: sums since the last training record: steps, loss, error, seconds.
    """

    seconds: float = 0.0
    train_seconds: float = 0.0
    train_examples: int = 0
    window: tuple[int, float, float, float] = (0, 0.0, 0.0, 0.0)

    @classmethod
    def from_record(cls, saved: dict[str, Any]) -> "History":
        """A history from a checkpoint's record; what an older version did not keep begins anew."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in saved.items() if k in known})


@dataclasses.dataclass
class Account:
    """The account of one net.

    Attributes:
      run: its experiment.
      directory: its own.
      history: so far.
      identity: see `identity.describe`.
      log: its records; opened by the loop.
      scores: of the last evaluation in this process.
      rate: learning rate of the last step.
    """

    run: Experiment
    directory: pathlib.Path
    history: History
    identity: dict[str, Any]
    log: Records = dataclasses.field(default_factory=lambda: Records([]))
    scores: dict[str, Score] = dataclasses.field(default_factory=dict)
    rate: float = math.nan

    def read(self, first: int, sums: dict[str, list[float]], seconds: float) -> str | None:
        """Takes in the results of a chunk.

        Args:
          first: steps done before it.
          sums: "loss", "error" and "rate" of each step.
          seconds: that it took.

        Returns:
          What is wrong, where a loss is not finite.
        """
        config, length = self.run.config, len(sums["loss"])
        self.history.train_seconds += seconds
        self.history.train_examples += length * config.data.batch_size
        for i in range(length):
            step, loss, self.rate = first + i + 1, sums["loss"][i], sums["rate"][i]
            if not math.isfinite(loss):
                return f"the loss is {loss} at step {step}"
            steps, loss_sum, error_sum, time_sum = self.history.window
            self.history.window = (
                steps + 1,
                loss_sum + loss,
                error_sum + sums["error"][i],
                time_sum + seconds / length,
            )
            if step % config.log.every_steps == 0 or step == config.train.total_steps:
                self._log_window(step)
        return None

    def _log_window(self, step: int) -> None:
        steps, loss, error, seconds = self.history.window
        self.history.window = 0, 0.0, 0.0, 0.0
        examples = steps * self.run.config.data.batch_size
        values = {
            "loss": loss / steps,
            "error": error / steps,
            "rate": self.rate,
            "examples": examples,
            "images_per_second": round(examples / max(seconds, 1e-9), 1),
        }
        self.log.write("train", step, values)

    def images_per_second(self) -> float:
        """Training examples of this net by time spent on training steps."""
        return self.history.train_examples / max(self.history.train_seconds, 1e-9)

    def best_step(self) -> int | None:
        """Step of the best evaluation so far."""
        split = record.selection_split(self.run.dataset)
        best = record.best(self.log.records, split)
        return best and best["step"]

    def note_scores(self, step: int, scores: dict[str, Score]) -> bool:
        """Records an evaluation; returns whether it is the best so far."""
        self.scores = scores
        for split, score in scores.items():
            self.log.write(split, step, record.describe_score(score))
        return self.best_step() == step

    def write_result(self, variables: Any, environment: dict[str, Any]) -> dict[str, Any]:
        """See `record.write_result`; `variables` are those that were scored."""
        return record.write_result(
            self.directory,
            self.run,
            variables,
            self.scores,
            self.log.records,
            seconds=self.history.seconds,
            images_per_second=self.images_per_second(),
            environment=environment,
        )
