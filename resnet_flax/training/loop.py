"""The training loop: dispatch, read back, log, evaluate, save, stop. No mathematics."""

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
from resnet_flax.training.net import Net

# Key of what a stopped run returns, to tell it from a finished one.
STOPPED = "stopped"


class Loop:
    """Dispatches chunks of steps, reading each one's results while the next is computed.

    Several nets of one configuration are trained in step with each other; one that lags behind,
    because it lost a checkpoint, catches up first. Several processes run the same loop in step.
    They all know what decides about a computation (what is due, when to stop); only the first has
    a log and writes checkpoints.
    """

    def __init__(self, nets: Sequence[Net], progress: Progress, environment: dict[str, Any]):
        self.nets, self.progress, self.environment = nets, progress, environment
        self.config = nets[0].setup.config
        self.first = self.step
        self.programs: dict[Any, Any] = {}
        self.pending: tuple[list[Net], int, list[dict]] | None = None
        # The signal this process has had, and the one for which all stop together.
        self.wish = self.stop_signal = 0
        self.clock = time.monotonic()
        self.train_clock = 0.0

    @property
    def step(self) -> int:
        """Steps that every net has done."""
        return min(net.step for net in self.nets)

    def run(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Trains to the end, or until a signal.

        Returns:
          The result of each net, see `Net.write_result`; [] if this is not the first process. If it
          was stopped: where, see `train.train`.
        """
        c, total = self.config, self.config.train.total_steps
        self._say_resumed()
        self.progress.start(total, self.step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(answered_by(self._ask, signal.SIGTERM, signal.SIGINT))
            for net in self.nets:
                stack.enter_context(contextlib.closing(net))
            # An evaluation that was due when the run was killed comes first.
            for net in self.nets:
                self._evaluate_if_due(net)
            while self.step < total and not self.stop_signal:
                turn = [net for net in self.nets if net.step == self.step]
                self._train(turn)
                for net in turn:
                    improved = self._evaluate_if_due(net)
                    if improved or net.step % c.checkpoint.every_steps == 0 or net.step == total:
                        self._save(net)
            for net in self.nets:
                if net.step < total:
                    self._save(net)
                net.wait()
            if not all(self._is_scored(net) for net in self.nets):
                return {STOPPED: self.step, "signal": signal.Signals(self.stop_signal).name}
            self._tick()
            if not distributed.is_first():
                return []
            return [net.write_result(self.environment) for net in self.nets]

    def _stopped(self) -> bool:
        return bool(self.stop_signal)

    def _is_scored(self, net: Net) -> bool:
        """Whether the last step is scored; scores that only the log has are made again."""
        if not net.log.has("test", self.config.train.total_steps):
            return False
        return bool(net.scores or net.score(self._stopped))

    def _say_resumed(self) -> None:
        every = self.config.log.every_steps
        for net in self.nets:
            if not net.saved:
                continue
            name, total = self._name(net), self.config.train.total_steps
            self.progress.say(f"{name}resumed from step {net.step} of {total}")
            if lost := net.log.count_lost(every, net.step):
                self.progress.say(
                    f"{name}metrics.jsonl lacks {lost} training records up to step {net.step}: it "
                    "has been damaged; training goes on, the curves will have a gap"
                )

    def _name(self, net: Net) -> str:
        """Prefix of a message about one of several nets."""
        return f"{net.directory.name}: " if len(self.nets) > 1 else ""

    def _chunk_length(self, turn: Sequence[Net]) -> int:
        """Steps to dispatch next: a whole chunk if nothing is due inside it, else one.

        Two lengths, not many: each is a program to compile.
        """
        c, step, setup = self.config, turn[0].step, turn[0].setup
        chunk = feed.chunk_steps(
            setup.train_feed, c.train.chunk_steps, sharding.platform(setup.mesh)
        )
        periods = c.log.every_steps, c.eval.every_steps, c.checkpoint.every_steps
        stops = [(step // p + 1) * p for p in periods]
        stops += [net.step for net in self.nets if net.step > step]
        return chunk if step + chunk <= min(c.train.total_steps, *stops) else 1

    def _train(self, turn: list[Net]) -> None:
        first, length = turn[0].step, self._chunk_length(turn)
        jobs = []
        for members in seeds.programs([net.setup.mesh for net in turn]):
            group = [turn[i] for i in members]
            feeds = [net.setup.train_feed for net in group]
            arguments = (
                [net.state for net in group],
                [f.resident for f in feeds],
                [f.chunk(first, length) for f in feeds],
            )
            if len(group) == 1:
                arguments = *(x[0] for x in arguments), self._wishes()
            jobs.append((group, arguments, self._program(group, length, arguments)))
        if not self.pending:
            self.train_clock = time.monotonic()
        nets, sums = [], []
        for group, arguments, program in jobs:
            states, found = program(*arguments)
            if len(group) == 1:
                states, found = [states], [found]
            for net, state in zip(group, states, strict=True):
                net.state, net.step = state, first + length
            nets += group
            sums += found
        before, self.pending = self.pending, (nets, first, sums)
        if before:
            self._read(*before)

    def _program(self, group: Sequence[Net], length: int, arguments) -> jax.stages.Compiled:
        key = group[0].setup.mesh, len(group), length
        if key not in self.programs:
            self._drain()
            chunk = group[0].setup.make_train_chunk(several=len(group) > 1)
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
        mesh = self.nets[0].setup.mesh
        return jax.make_array_from_callback((mesh.size,), sharding.split(mesh), lambda _: here)

    def _drain(self) -> None:
        """Reads the results of everything dispatched so far."""
        if self.pending:
            pending, self.pending = self.pending, None
            self._read(*pending)

    def _read(self, nets: list[Net], first: int, sums: list[dict]) -> None:
        sums = jax.device_get(sums)
        self.stop_signal = int(sums[0].get("wish", self.stop_signal))
        now = time.monotonic()
        seconds, self.train_clock = now - self.train_clock, now
        for net, own in zip(nets, sums, strict=True):
            if wrong := net.read(first, own, seconds):
                raise self._diverged(net, f"{self._name(net)}{wrong}")
        loss, error = (np.mean([own[name][-1] for own in sums]) for name in ("loss", "error"))
        speed = sum(net.images_per_second() for net in nets)
        self.progress.update(first + len(sums[0]["loss"]), loss, error, nets[0].rate, speed)

    def _diverged(self, net: Net, what: str) -> UserError:
        with contextlib.suppress(UserError):
            net.wait()
        return UserError(
            f"{what} (learning rate {net.rate:g}); last good checkpoint: {net.saved or 'none'}\n"
            "lower config.optim.learning_rate, or warm up with config.optim.warmup_steps"
        )

    def _evaluate_if_due(self, net: Net) -> bool:
        """Evaluates if it is due; returns whether the score is the net's best so far."""
        c = self.config
        due = net.step % c.eval.every_steps == 0 or net.step == c.train.total_steps
        if not net.step or not due or net.log.has("test", net.step):
            return False
        self._drain()
        scores = net.score(self._stopped)
        if not scores:
            return False
        errors = ", ".join(f"{s} error {100 * v.error:.2f} %" for s, v in scores.items())
        self.progress.say(f"{self._name(net)}step {net.step}: {errors}")
        return net.best_step() == net.step

    def _save(self, net: Net) -> None:
        self._drain()
        self._tick()
        try:
            net.save()
        except checkpoint.NotFiniteError as error:
            raise self._diverged(net, f"{self._name(net)}{error}") from error

    def _tick(self) -> None:
        now = time.monotonic()
        for net in self.nets:
            net.tick(now - self.clock)
        self.clock = now

    def _ask(self, number: int) -> bool:
        """Answers SIGTERM and Ctrl-C with a save and a clean end.

        A second Ctrl-C is final, and so is one before the first step, when nothing is lost.
        """
        if number == signal.SIGINT and (self.wish == number or self.step == self.first):
            return True
        self.wish = number
        if distributed.count() == 1:
            self.stop_signal = number
        self.progress.say(
            f"{signal.Signals(number).name}: saving, then stopping; Ctrl-C now ends at once"
        )
        return False
