"""The training loop: dispatch, read back, log, evaluate, save, stop."""

import contextlib
import signal
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from resnet_flax.devices import cpu, distributed, hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint
from resnet_flax.runs.progress import Progress
from resnet_flax.signals import answered_by
from resnet_flax.training import feed, seeds
from resnet_flax.training.run import Run

STOPPED = "stopped"
"""Key of what a stopped run returns, to tell it from a finished one."""

# `timeout -s INT` and others send one Ctrl-C twice: to the process, and to its group.
_ECHO_SECONDS = 0.5


class Loop:
    """Dispatches chunks of steps, reading each one's results while the next is computed.

    Several runs of one configuration train in step with each other; one that lags behind, because
    it lost a checkpoint, catches up first. Several processes run the same loop in step: each knows
    what is due and when to stop, and only the first has a log on disk and writes checkpoints.
    """

    def __init__(self, runs: Sequence[Run], progress: Progress):
        self.runs, self.progress = runs, progress
        self.config = runs[0].setup.config
        self.first = self.step
        self.programs: dict[Any, jax.stages.Compiled] = {}
        self.pending: tuple[list[Run], int, list[dict]] | None = None
        # The signal this process has had, and the one for which all stop together.
        self.wish = self.stop_signal = 0
        self.clock = self.train_clock = self.asked = time.monotonic()

    @property
    def step(self) -> int:
        """Steps that every run has done."""
        return min(run.step for run in self.runs)

    def run(self) -> dict[str, Any] | None:
        """Trains to the end and writes the results, or until a signal; then returns where."""
        c, total = self.config, self.config.train.total_steps
        self._say_resumed()
        self.progress.start(total, self.step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(answered_by(self._ask, signal.SIGTERM, signal.SIGINT))
            for run in self.runs:
                stack.enter_context(contextlib.closing(run))
            # An evaluation that was due when the run was killed comes first.
            for run in self.runs:
                self._evaluate_if_due(run)
            while self.step < total and not self.stop_signal:
                turn = [run for run in self.runs if run.step == self.step]
                self._train(turn)
                for run in turn:
                    improved = self._evaluate_if_due(run)
                    if improved or run.step % c.checkpoint.every_steps == 0 or run.step == total:
                        self._save(run)
            for run in self.runs:
                if run.step < total:
                    self._save(run)
                run.wait()
            if not all(self._is_scored(run) for run in self.runs):
                return {STOPPED: self.step, "signal": signal.Signals(self.stop_signal).name}
            self._tick()
            if distributed.is_first():
                for run in self.runs:
                    run.write_result()
        return None

    def _stopped(self) -> bool:
        return bool(self.stop_signal)

    def _is_scored(self, run: Run) -> bool:
        """Whether the last step is scored; scores that only the log has are made again."""
        if not run.log.has("test", self.config.train.total_steps):
            return False
        return bool(run.scores or run.score(self._stopped))

    def _say_resumed(self) -> None:
        for run in self.runs:
            if not run.saved:
                continue
            name, total = self._name(run), self.config.train.total_steps
            self.progress.say(f"{name}resumed from step {run.step} of {total}")
            if lost := run.log.count_lost(self.config.log.every_steps, run.step):
                self.progress.say(
                    f"{name}metrics.jsonl lacks {lost} training records up to step {run.step}: it "
                    "has been damaged; training goes on, the curves will have a gap"
                )

    def _name(self, run: Run) -> str:
        """Prefix of a message about one of several runs."""
        return f"{run.path.name}: " if len(self.runs) > 1 else ""

    def _chunk_length(self, turn: Sequence[Run]) -> int:
        """Steps to dispatch next: a whole chunk if nothing is due inside it, else one.

        Two lengths, not many: each is a program to compile.
        """
        c, step, setup = self.config, turn[0].step, turn[0].setup
        platform = sharding.platform(setup.mesh)
        chunk = feed.chunk_steps(setup.train_feed, c.train.chunk_steps, platform)
        periods = c.log.every_steps, c.eval.every_steps, c.checkpoint.every_steps
        stops = [(step // p + 1) * p for p in periods]
        stops += [run.step for run in self.runs if run.step > step]
        return chunk if step + chunk <= min(c.train.total_steps, *stops) else 1

    def _train(self, turn: list[Run]) -> None:
        first, length = turn[0].step, self._chunk_length(turn)
        jobs = []
        for members in seeds.programs([run.setup.mesh for run in turn]):
            group = [turn[i] for i in members]
            feeds = [run.setup.train_feed for run in group]
            arguments = (
                [run.state for run in group],
                [f.resident for f in feeds],
                [f.chunk(first, length) for f in feeds],
                self._wishes(),
            )
            jobs.append((group, arguments, self._program(group, length, arguments)))
        if not self.pending:
            self.train_clock = time.monotonic()
        trained, sums = [], []
        for group, arguments, program in jobs:
            states, found = program(*arguments)
            for run, state in zip(group, states, strict=True):
                run.state, run.step = state, first + length
            trained += group
            sums += found
        before, self.pending = self.pending, (trained, first, sums)
        if before:
            self._read(*before)

    def _program(self, group: Sequence[Run], length: int, arguments) -> jax.stages.Compiled:
        key = group[0].setup.mesh, len(group), length
        if key not in self.programs:
            self._drain()
            chunk = group[0].setup.make_train_chunk(several=len(group) > 1)
            with self.progress.waiting("compiling the training step"):
                self.programs[key] = compiled = chunk.lower(*arguments).compile()
            hardware.check_memory(compiled, self.config.data.batch_size)
            cpu.limit_kept_memory(compiled)
        return self.programs[key]

    def _wishes(self) -> jax.Array | None:
        """This process's stop request; the step returns the maximum over all processes.

        It comes back with the chunk's other results, so all processes read it at the same step.
        """
        if distributed.count() == 1:
            return None
        here = np.full(1, self.wish, np.int32)
        mesh = self.runs[0].setup.mesh
        return jax.make_array_from_callback((mesh.size,), sharding.split(mesh), lambda _: here)

    def _drain(self) -> None:
        """Reads the results of everything dispatched so far."""
        if self.pending:
            pending, self.pending = self.pending, None
            self._read(*pending)

    def _read(self, runs: list[Run], first: int, sums: list[dict]) -> None:
        sums = jax.device_get(sums)
        self.stop_signal = int(sums[0].get("wish", self.stop_signal))
        now = time.monotonic()
        seconds, self.train_clock = now - self.train_clock, now
        for run, own in zip(runs, sums, strict=True):
            if wrong := run.read(first, own, seconds):
                raise self._diverged(run, wrong)
        loss, error = (np.mean([own[name][-1] for own in sums]) for name in ("loss", "error"))
        speed = sum(run.images_per_second() for run in runs)
        self.progress.update(first + len(sums[0]["loss"]), loss, error, runs[0].rate, speed)

    def _diverged(self, run: Run, what: str) -> UserError:
        with contextlib.suppress(UserError):
            run.wait()
        return UserError(
            f"{self._name(run)}{what} (learning rate {run.rate:g}); last good checkpoint: "
            f"{run.saved or 'none'}\n"
            "lower config.optim.learning_rate, or warm up with config.optim.warmup_steps"
        )

    def _evaluate_if_due(self, run: Run) -> bool:
        """Evaluates if it is due; returns whether the score is the run's best so far."""
        c = self.config
        due = run.step % c.eval.every_steps == 0 or run.step == c.train.total_steps
        if not run.step or not due or run.log.has("test", run.step):
            return False
        self._drain()
        with self.progress.waiting("evaluating"):
            scores = run.score(self._stopped)
        if not scores:
            return False
        errors = ", ".join(f"{s} error {100 * v.error:.2f} %" for s, v in scores.items())
        self.progress.say(f"{self._name(run)}step {run.step}: {errors}")
        return run.best_step() == run.step

    def _save(self, run: Run) -> None:
        self._drain()
        self._tick()
        try:
            run.save()
        except checkpoint.NotFiniteError as error:
            raise self._diverged(run, str(error)) from error

    def _tick(self) -> None:
        """Adds the time since the last call to the runs' wall-clock time."""
        now = time.monotonic()
        for run in self.runs:
            run.history.seconds += now - self.clock
        self.clock = now

    def _ask(self, number: int) -> bool:
        """Answers SIGTERM and Ctrl-C with a save and a clean end.

        A second Ctrl-C is final, and so is one before the first step, when nothing is lost.
        """
        if number == signal.SIGINT:
            if self.step == self.first:
                return True
            if self.wish == number:
                return time.monotonic() - self.asked > _ECHO_SECONDS
        self.wish, self.asked = number, time.monotonic()
        if distributed.count() == 1:
            self.stop_signal = number
        self.progress.say(
            f"{signal.Signals(number).name}: saving, then stopping; Ctrl-C now ends at once"
        )
        return False
