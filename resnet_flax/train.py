"""A run from its first or last step to its results: wiring and the loop, no mathematics."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from resnet_flax import checkpoint, experiment, models, record, sharding, weights, workdir
from resnet_flax.config import validate
from resnet_flax.data import stream
from resnet_flax.errors import UserError
from resnet_flax.experiment import Experiment
from resnet_flax.metrics import RunLog
from resnet_flax.progress import Progress
from resnet_flax.state import TrainState

# Of the last line a stopped run prints, so that scripts can tell it from a finished one.
STOPPED = "stopped"


def train(config: ConfigDict, directory: pathlib.Path, init_weights: str | None = None) -> dict:
    """Trains, or goes on training, as configured; leaves everything in `directory`.

    Where it begins: at the newest undamaged checkpoint of the directory; else from `init_weights`;
    else from the seed.

    Args:
      config: see `config.base_config`.
      directory: the run's own.
      init_weights: a weights file to initialise a new run from.

    Returns:
      What `result.json` holds, or `{"stopped": step}` when SIGTERM or SIGINT ended the run early.

    Raises:
      UserError: anything the user can mend.
    """
    validate(config)
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    mesh = experiment.choose_mesh(config)
    with workdir.claim(directory), contextlib.closing(Progress()) as progress:
        record.check_same_config(directory, config)
        dataset = experiment.load_data(config)
        record.check_same_data(directory, dataset)
        run = experiment.build(config, dataset, mesh)
        found = checkpoint.read_newest(directory / "checkpoints", progress.say, set_aside=True)
        total = run.config.train.total_steps
        if found and found[0] == total and (result := record.finished(directory, total)):
            progress.say(f"the run in {directory} is finished")
            return result
        state, history = _first_state(run, found, init_weights)
        record.write_start(directory, config, run, step=int(state.step))
        return _Loop(run, directory, state, history, progress).run()


def _first_state(run: Experiment, found, init_weights) -> tuple[TrainState, "History"]:
    if found is not None:
        _, tree, saved = found
        state = checkpoint.from_tree(tree, run.abstract_state(), run.model.scan)
        state = jax.device_put(state, sharding.replicated(run.mesh))
        # A copy: device_put may alias the host array, and donation would then free it twice.
        return jax.tree.map(lambda x: x.copy(), state), History(**saved)
    if init_weights is not None:
        loaded = weights.load(pathlib.Path(init_weights))
        variables = weights.fit(loaded.variables, run.abstract_variables(), str(init_weights))
        return run.create_state(variables), History()
    return run.create_state(), History()


@dataclasses.dataclass
class History:
    """What a checkpoint remembers beside the state.

    Attributes:
      seconds: wall-clock of all the run's processes, start-up excluded.
      train_seconds: the part spent on training steps, compilation excluded.
      train_examples: examples trained on in `train_seconds`.
      window: sums since the last training record: steps, loss, error.
    """

    seconds: float = 0.0
    train_seconds: float = 0.0
    train_examples: int = 0
    window: tuple[int, float, float] = (0, 0.0, 0.0)


def summary(result: dict[str, Any], directory: pathlib.Path) -> str:
    """What a finished run says last: what was learned, where it lies, what to run next."""
    lines = [
        f"{result['model']} on {result['data']}: {100 * result['test_error_last']:.2f} % test "
        f"error ({result['test_wrong_last']} of {result['test_examples']} wrong) after "
        f"{result['steps']} steps in {result['seconds']:.0f} s.",
        f"Curves: {directory / 'curves.png'}  results: {directory / 'result.json'}  weights: "
        f"{directory / 'weights.safetensors'}",
    ]
    if result["data"] == "digits":
        lines.append(
            "It has learned to read handwritten digits. Next, CIFAR-10 in half an hour on a CPU:\n"
            "  python -m resnet_flax.main --config=configs/cifar10_short.py"
        )
    return "\n".join(lines)


class _Loop:
    """Dispatches chunks of steps, reading each one's results while the next is computed."""

    def __init__(self, run: Experiment, directory, state, history: History, progress: Progress):
        self.run_, self.directory, self.state = run, directory, state
        self.config, self.history, self.progress = run.config, history, progress
        self.step = int(state.step)
        self.log = RunLog(directory, self.step, self.config.log.tensorboard)
        self.writer = checkpoint.Writer(directory / "checkpoints", self.config.checkpoint.keep)
        self.train_chunk = run.make_train_chunk()
        self.score = run.make_scorer()
        self.pending: tuple[int, dict] | None = None
        self.saved: str | None = None
        self.scores: dict[str, Any] = {}
        self.rate = math.nan
        self.compiled = False
        self.stop_signal = 0
        self.clock = time.monotonic()
        self.train_clock: float | None = None

    def run(self) -> dict:
        total = self.config.train.total_steps
        if self.step:
            self.saved = str(self.directory / "checkpoints" / str(self.step))
            self.progress.say(f"resumed from step {self.step} of {total}")
        self.progress.start(total, self.step)
        with self._signals(), contextlib.closing(self.log), contextlib.closing(self.writer):
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
            self._tick()
            if not self.scores:
                self.scores = self.score(self.state.evaluated())
            return record.write_result(
                self.directory,
                self.run_,
                self.state,
                self.scores,
                self.log.records,
                seconds=self.history.seconds,
                images_per_second=self._images_per_second(),
            )

    def _next_stop(self) -> int:
        """The step before which the host must see nothing."""
        c = self.config
        chunk = c.train.chunk_steps or (1 if jax.default_backend() == "cpu" else 100)
        periods = c.log.every_steps, c.eval.every_steps, c.checkpoint.every_steps
        stops = [(self.step // p + 1) * p for p in periods]
        return min(self.step + chunk, c.train.total_steps, *stops)

    def _train(self) -> None:
        c, stop = self.config, self._next_stop()
        index = stream.indices(
            c.seed,
            self.step,
            stop - self.step,
            c.data.batch_size,
            len(self.run_.dataset.train.labels),
        )
        if self.train_clock is None:
            self.train_clock = time.monotonic()
        self.state, sums = self.train_chunk(
            self.state,
            self.run_.train_resident,
            sharding.put(index, sharding.split(self.run_.mesh, 1)),
        )
        before, self.pending = self.pending, (self.step, sums)
        self.step = stop
        if before:
            self._read(before)
        if not self.compiled:
            # The first chunk's time is mostly compilation, and says nothing of the speed.
            before = self.history.train_seconds, self.history.train_examples
            self._drain()
            self.history.train_seconds, self.history.train_examples = before
            self.compiled = True

    def _drain(self) -> None:
        """Reads everything dispatched so far, and stops the training clock."""
        if self.pending:
            self._read(self.pending)
            self.pending = None
        self.train_clock = None

    def _read(self, chunk: tuple[int, dict]) -> None:
        first, sums = chunk
        sums = jax.device_get(sums)
        now = time.monotonic()
        h, batch = self.history, self.config.data.batch_size
        h.train_seconds += now - self.train_clock
        h.train_examples += batch * len(sums["loss"])
        self.train_clock = now
        for i, (loss, error, rate) in enumerate(
            zip(*(sums[k].tolist() for k in ("loss", "error", "rate")), strict=True)
        ):
            step = first + i + 1
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss} at step {step}", rate)
            steps, loss_sum, error_sum = h.window
            h.window = steps + 1, loss_sum + loss, error_sum + error
            if step % self.config.log.every_steps == 0 or step == self.config.train.total_steps:
                self._log_window(step, rate)
        self.rate = rate
        self.progress.update(step, loss, error, rate, self._images_per_second())

    def _diverged(self, what: str, rate: float) -> UserError:
        return UserError(
            f"{what} (learning rate {rate:g}); last good checkpoint: {self.saved or 'none'}\n"
            "lower config.optim.learning_rate, or warm up with config.optim.warmup_steps"
        )

    def _log_window(self, step: int, rate: float) -> None:
        steps, loss, error = self.history.window
        self.history.window = 0, 0.0, 0.0
        values = {
            "loss": loss / steps,
            "error": error / steps,
            "rate": rate,
            "examples": steps * self.config.data.batch_size,
            "images_per_second": round(self._images_per_second(), 1),
        }
        self.log.write("train", step, values)

    def _images_per_second(self) -> float:
        return self.history.train_examples / max(self.history.train_seconds, 1e-9)

    def _evaluate_if_due(self) -> bool:
        """Evaluates where it is time to; returns whether the result is the best so far."""
        c = self.config
        due = self.step % c.eval.every_steps == 0 or self.step == c.train.total_steps
        if not self.step or not due or self.log.has("test", self.step):
            return False
        self._drain()
        self.scores = self.score(self.state.evaluated())
        for split, score in self.scores.items():
            self.log.write(split, self.step, record.describe_score(score))
        errors = ", ".join(f"{s} error {100 * v.error:.2f} %" for s, v in self.scores.items())
        self.progress.say(f"step {self.step}: {errors}")
        return self._best_step() == self.step

    def _best_step(self) -> int | None:
        split = record.selection_split(self.run_.dataset)
        best = record.best(self.log.records, split)
        return best and best["step"]

    def _save(self) -> None:
        self._drain()
        self._tick()
        self.log.sync()
        self.writer.best_step = self._best_step()
        if self.saved and pathlib.Path(self.saved).name == str(self.step):
            return
        try:
            self.saved = self.writer.save(self.state, dataclasses.asdict(self.history))
        except checkpoint.NotFiniteError as error:
            raise self._diverged(str(error), self.rate) from error

    def _tick(self) -> None:
        now = time.monotonic()
        self.history.seconds += now - self.clock
        self.clock = now

    @contextlib.contextmanager
    def _signals(self):
        """SIGTERM and the first SIGINT ask for a save and a clean end; a second SIGINT is final."""

        def stop(number, frame):
            del frame
            if number == signal.SIGINT and self.stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
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
