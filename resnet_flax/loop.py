"""The training loop: dispatch, read back, record, evaluate, save, stop. No mathematics."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from resnet_flax import checkpoint, distributed, feed, record, sharding
from resnet_flax.errors import UserError
from resnet_flax.experiment import Experiment
from resnet_flax.metrics import Records, RunLog
from resnet_flax.progress import Progress
from resnet_flax.state import TrainState

# Key of what a stopped run returns, to tell it from a finished one.
STOPPED = "stopped"


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


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run's checkpoints lie, and what each says of the run.

    Attributes:
      directory: local, or anywhere that orbax can write to.
      run: see `identity.describe`.
      resumed: whether the run goes on from one of them.
    """

    directory: epath.Path
    run: dict[str, Any]
    resumed: bool


class Loop:
    """Dispatches chunks of steps, reading each one's results while the next is computed.

    Several processes run the same loop in step. Whatever decides about a computation (what is due,
    when to stop) they know alike; only the first has a log and a writer of checkpoints.
    """

    def __init__(
        self,
        run: Experiment,
        directory: pathlib.Path,
        state: TrainState,
        history: History,
        progress: Progress,
        environment: dict[str, Any],
        checkpoints: Checkpoints,
    ):
        """Prepares to go on from `state`."""
        self.experiment, self.directory, self.state = run, directory, state
        self.config, self.history, self.progress = run.config, history, progress
        self.environment, self.checkpoints = environment, checkpoints
        self.step = int(state.step)
        # The newest checkpoint.
        self.saved = checkpoints.directory / str(self.step) if checkpoints.resumed else None
        self.log, self.writer = self._open()
        self.train_chunk = run.make_train_chunk()
        self.evaluated = run.make_evaluated()
        self.score = run.make_scorer()
        self.compiled: dict[int, Any] = {}
        self.pending: tuple[int, dict] | None = None
        self.scores: dict[str, Any] = {}
        self.rate = math.nan
        # The signal this process has had, and the one for which all stop together.
        self.wish = self.stop_signal = 0
        self.clock = time.monotonic()
        self.train_clock = 0.0

    def _open(self):
        if not distributed.is_first():
            return Records(distributed.share(list)), checkpoint.NoWriter()
        log = RunLog(self.directory, self.step, self.config.log.tensorboard)
        distributed.share(lambda: log.records)
        return log, checkpoint.Writer(self.checkpoints.directory, self.config.checkpoint.keep)

    def run(self) -> dict[str, Any]:
        """Trains to the end, or until a signal; returns the result, see `train.train`."""
        total = self.config.train.total_steps
        if self.saved:
            self.progress.say(f"resumed from step {self.step} of {total}")
            if lost := self.log.count_lost(self.config.log.every_steps, self.step):
                self.progress.say(
                    f"metrics.jsonl lacks {lost} training records up to step {self.step}: it has "
                    "been damaged; training goes on, the curves will have a gap"
                )
        self.progress.start(total, self.step)
        with self._signals(), contextlib.ExitStack() as stack:
            for thing in (self.log, self.writer, self.experiment):
                stack.enter_context(contextlib.closing(thing))
            # An evaluation that was due when the run was killed comes first.
            self._evaluate_if_due()
            while self.step < total and not self.stop_signal:
                self._train()
                improved = self._evaluate_if_due()
                due = self.step % self.config.checkpoint.every_steps == 0 or self.step == total
                if due or improved:
                    self._save()
            if self.step < total:
                self._save()
                self.writer.wait()
                return {STOPPED: self.step, "signal": signal.Signals(self.stop_signal).name}
            self.writer.wait()
            variables = self.evaluated(self.state.evaluated())
            self.scores = self.scores or self.score(variables)
            self._tick()
            if not distributed.is_first():
                return {}
            return record.write_result(
                self.directory,
                self.experiment,
                variables,
                self.scores,
                self.log.records,
                seconds=self.history.seconds,
                images_per_second=self._images_per_second(),
                environment=self.environment,
            )

    def _chunk_length(self) -> int:
        """Steps to dispatch next: a whole chunk where nothing is due inside it, else one.

        Two lengths, not many: each is a program to compile.
        """
        c = self.config
        chunk = feed.chunk_steps(self.experiment.train_feed, c.train.chunk_steps)
        periods = c.log.every_steps, c.eval.every_steps, c.checkpoint.every_steps
        stops = [(self.step // p + 1) * p for p in periods]
        return chunk if self.step + chunk <= min(c.train.total_steps, *stops) else 1

    def _train(self) -> None:
        length, examples = self._chunk_length(), self.experiment.train_feed
        batches = examples.chunk(self.step, length)
        arguments = self.state, examples.resident, batches, self._wishes()
        if length not in self.compiled:
            self._drain()
            self.compiled[length] = self.train_chunk.lower(*arguments).compile()
        if not self.pending:
            self.train_clock = time.monotonic()
        self.state, sums = self.compiled[length](*arguments)
        before, self.pending = self.pending, (self.step, sums)
        self.step += length
        if before:
            self._read(before)

    def _wishes(self) -> jax.Array | None:
        """What each process has been asked to do, for the step to find what all will.

        The answer comes back with the chunk's other results, so all read it at the same step.
        """
        if distributed.count() == 1:
            return None
        here = np.full(1, self.wish, np.int32)
        mesh = self.experiment.mesh
        return jax.make_array_from_callback((mesh.size,), sharding.split(mesh), lambda _: here)

    def _drain(self) -> None:
        """Reads everything dispatched so far."""
        if self.pending:
            pending, self.pending = self.pending, None
            self._read(pending)

    def _read(self, chunk: tuple[int, dict]) -> None:
        first, sums = chunk
        sums = {name: values.tolist() for name, values in jax.device_get(sums).items()}
        self.stop_signal = sums.pop("wish", self.stop_signal)
        now = time.monotonic()
        seconds, self.train_clock = now - self.train_clock, now
        length = len(sums["loss"])
        self.history.train_seconds += seconds
        self.history.train_examples += length * self.config.data.batch_size
        for i in range(length):
            step, loss, self.rate = first + i + 1, sums["loss"][i], sums["rate"][i]
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss} at step {step}")
            steps, loss_sum, error_sum, time_sum = self.history.window
            self.history.window = (
                steps + 1,
                loss_sum + loss,
                error_sum + sums["error"][i],
                time_sum + seconds / length,
            )
            if step % self.config.log.every_steps == 0 or step == self.config.train.total_steps:
                self._log_window(step)
        self.progress.update(step, loss, sums["error"][-1], self.rate, self._images_per_second())

    def _log_window(self, step: int) -> None:
        steps, loss, error, seconds = self.history.window
        self.history.window = 0, 0.0, 0.0, 0.0
        examples = steps * self.config.data.batch_size
        values = {
            "loss": loss / steps,
            "error": error / steps,
            "rate": self.rate,
            "examples": examples,
            "images_per_second": round(examples / max(seconds, 1e-9), 1),
        }
        self.log.write("train", step, values)

    def _images_per_second(self) -> float:
        return self.history.train_examples / max(self.history.train_seconds, 1e-9)

    def _diverged(self, what: str) -> UserError:
        with contextlib.suppress(UserError):
            self.writer.wait()
        return UserError(
            f"{what} (learning rate {self.rate:g}); last good checkpoint: {self.saved or 'none'}\n"
            "lower config.optim.learning_rate, or warm up with config.optim.warmup_steps"
        )

    def _evaluate_if_due(self) -> bool:
        """Evaluates where it is time to; returns whether the result is the best so far."""
        c = self.config
        due = self.step % c.eval.every_steps == 0 or self.step == c.train.total_steps
        if not self.step or not due or self.log.has("test", self.step):
            return False
        self._drain()
        self.scores = self.score(self.evaluated(self.state.evaluated()))
        for split, score in self.scores.items():
            self.log.write(split, self.step, record.describe_score(score))
        errors = ", ".join(f"{s} error {100 * v.error:.2f} %" for s, v in self.scores.items())
        self.progress.say(f"step {self.step}: {errors}")
        return self._best_step() == self.step

    def _best_step(self) -> int | None:
        split = record.selection_split(self.experiment.dataset)
        best = record.best(self.log.records, split)
        return best and best["step"]

    def _save(self) -> None:
        self._drain()
        self._tick()
        self.log.sync()
        self.writer.best_step = self._best_step()
        if self.saved and self.saved.name == str(self.step):
            return
        try:
            history = dataclasses.asdict(self.history)
            self.writer.save(self.state, {**history, "run": self.checkpoints.run})
        except checkpoint.NotFiniteError as error:
            raise self._diverged(str(error)) from error
        self.saved = self.checkpoints.directory / str(self.step)

    def _tick(self) -> None:
        now = time.monotonic()
        self.history.seconds += now - self.clock
        self.clock = now

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and the first SIGINT ask for a save and a clean end; a second SIGINT is final."""

        def stop(number, frame):
            del frame
            if number == signal.SIGINT and self.wish == signal.SIGINT:
                raise KeyboardInterrupt
            self.wish = number
            if distributed.count() == 1:
                self.stop_signal = number

        try:
            old = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # Not the main thread: signals are somebody else's business.
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
