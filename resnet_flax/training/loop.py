"""The training loop: dispatch, read back, record, evaluate, save, stop. No mathematics."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from resnet_flax.devices import cpu, distributed, hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint
from resnet_flax.runs.metrics import Records, RunLog
from resnet_flax.runs.progress import Progress
from resnet_flax.signals import answered_by
from resnet_flax.training import feed
from resnet_flax.training.account import Account
from resnet_flax.training.evaluate import Score
from resnet_flax.training.experiment import Experiment
from resnet_flax.training.seeds import Group
from resnet_flax.training.state import TrainState

# Key of what a stopped run returns, to tell it from a finished one.
STOPPED = "stopped"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run's checkpoints lie.

    Attributes:
      directory: local, or anywhere that orbax can write to.
      resumed: whether the run goes on from one of them.
      hand_out: called with the accounts once the last one is there, before there are results.
    """

    directory: epath.Path
    resumed: bool
    hand_out: Callable[[Sequence[Account]], None] = lambda accounts: None


def step_of(state: TrainState) -> int:
    """Steps done, by all nets alike."""
    return int(np.ravel(jax.device_get(state.step))[0])


class Loop:
    """Dispatches chunks of steps, reading each one's results while the next is computed.

    A step is one of a run, or of several that differ in the seed only, see `seeds.Group`.

    Several processes run the same loop in step. Whatever decides about a computation (what is due,
    when to stop) they know alike; only the first has a log and a writer of checkpoints.
    """

    def __init__(
        self,
        run: Experiment | Group,
        accounts: Sequence[Account],
        state: TrainState,
        progress: Progress,
        environment: dict[str, Any],
        checkpoints: Checkpoints,
    ):
        """Prepares to go on from `state`, with the account of each of `run.members`."""
        self.experiment, self.accounts, self.state = run, accounts, state
        self.config, self.progress = run.config, progress
        self.environment, self.checkpoints = environment, checkpoints
        self.first = self.step = step_of(state)
        # The newest checkpoint.
        self.saved = checkpoints.directory / str(self.step) if checkpoints.resumed else None
        self.writer = self._open()
        self.train_chunk = run.make_train_chunk()
        self.evaluated = run.make_evaluated()
        self.score = run.make_scorer()
        self.compiled: dict[int, Any] = {}
        self.pending: tuple[int, dict] | None = None
        # The signal this process has had, and the one for which all stop together.
        self.wish = self.stop_signal = 0
        self.clock = time.monotonic()
        self.train_clock = 0.0

    def _open(self):
        for account in self.accounts:
            if distributed.is_first():
                log = RunLog(account.directory, self.step, self.config.log.tensorboard)
                distributed.share(lambda log=log: log.records)
            else:
                log = Records(distributed.share(list))
            account.log = log
        if not distributed.is_first():
            return checkpoint.NoWriter()
        return checkpoint.Writer(self.checkpoints.directory, self.config.checkpoint.keep)

    def run(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Trains to the end, or until a signal.

        Returns:
          The result of each account, see `record.write_result`; none where this is not the first
          process; or where it stopped, see `train.train`.
        """
        total = self.config.train.total_steps
        if self.saved:
            self.progress.say(f"resumed from step {self.step} of {total}")
            for account in self.accounts:
                if lost := account.log.count_lost(self.config.log.every_steps, self.step):
                    self.progress.say(
                        f"{self._name(account)}metrics.jsonl lacks {lost} training records up to "
                        f"step {self.step}: it has been damaged; training goes on, the curves will "
                        "have a gap"
                    )
        self.progress.start(total, self.step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(answered_by(self._ask, signal.SIGTERM, signal.SIGINT))
            for thing in (*(a.log for a in self.accounts), self.writer, self.experiment):
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
            if not self._is_scored():
                return {STOPPED: self.step, "signal": signal.Signals(self.stop_signal).name}
            self._tick()
            self.checkpoints.hand_out(self.accounts)
            if not distributed.is_first():
                return []
            return [
                account.write_result(self._variables(i), self.environment)
                for i, account in enumerate(self.accounts)
            ]

    def _is_scored(self) -> bool:
        """Whether all nets are trained and scored; scores that only the log has are made again."""
        if not all(a.log.has("test", self.config.train.total_steps) for a in self.accounts):
            return False
        for i, account in enumerate(self.accounts):
            account.scores = account.scores or self._score(i)
        return all(account.scores for account in self.accounts)

    def _score(self, member: int) -> dict[str, Score]:
        """Scores of one net by split; {} where a signal to stop came first."""
        run = self.accounts[member].run
        return self.score(self._variables(member), run, lambda: bool(self.stop_signal))

    def _variables(self, member: int) -> Any:
        """Those of one net that are scored and saved."""
        variables = self.experiment.evaluated(self.state, member)
        return self.evaluated(variables, self.accounts[member].run)

    def _name(self, account: Account) -> str:
        """What a message begins with where there are several nets."""
        return f"{account.directory.name}: " if len(self.accounts) > 1 else ""

    def _chunk_length(self) -> int:
        """Steps to dispatch next: a whole chunk where nothing is due inside it, else one.

        Two lengths, not many: each is a program to compile.
        """
        c = self.config
        chunk = feed.chunk_steps(
            self.experiment.train_feed, c.train.chunk_steps, sharding.platform(self.experiment.mesh)
        )
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
            hardware.check_memory(self.compiled[length], self.config.data.batch_size)
            cpu.limit_kept_memory(self.compiled[length])
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
        sums = jax.device_get(sums)
        self.stop_signal = int(sums.pop("wish", self.stop_signal))
        now = time.monotonic()
        seconds, self.train_clock = now - self.train_clock, now
        count, length = len(self.accounts), len(sums["loss"])
        # Of several nets: [steps, nets].
        by_net = {name: values.reshape(length, count).T.tolist() for name, values in sums.items()}
        for i, account in enumerate(self.accounts):
            own = {name: values[i] for name, values in by_net.items()}
            if wrong := account.read(first, own, seconds):
                raise self._diverged(f"{self._name(account)}{wrong}", account.rate)
        loss, error = (sum(v[-1] for v in by_net[name]) / count for name in ("loss", "error"))
        speed = sum(account.images_per_second() for account in self.accounts)
        self.progress.update(first + length, loss, error, account.rate, speed)

    def _diverged(self, what: str, rate: float) -> UserError:
        with contextlib.suppress(UserError):
            self.writer.wait()
        return UserError(
            f"{what} (learning rate {rate:g}); last good checkpoint: {self.saved or 'none'}\n"
            "lower config.optim.learning_rate, or warm up with config.optim.warmup_steps"
        )

    def _evaluate_if_due(self) -> bool:
        """Evaluates where it is time to; returns whether a result is the best so far of its net."""
        c, improved = self.config, False
        due = self.step % c.eval.every_steps == 0 or self.step == c.train.total_steps
        if not self.step or not due:
            return False
        for i, account in enumerate(self.accounts):
            if account.log.has("test", self.step):
                continue
            self._drain()
            scores = self._score(i)
            if not scores:
                break
            improved |= account.note_scores(self.step, scores)
            errors = ", ".join(f"{s} error {100 * v.error:.2f} %" for s, v in scores.items())
            self.progress.say(f"{self._name(account)}step {self.step}: {errors}")
        return improved

    def _save(self) -> None:
        self._drain()
        self._tick()
        for account in self.accounts:
            account.log.sync()
        self.writer.best_steps = {account.best_step() for account in self.accounts}
        if self.saved and self.saved.name == str(self.step):
            return
        try:
            self.writer.save(*self._checkpoint())
        except checkpoint.NotFiniteError as error:
            raise self._diverged(str(error), self.accounts[-1].rate) from error
        self.saved = self.checkpoints.directory / str(self.step)

    def _checkpoint(self) -> tuple[Any, dict[str, Any]]:
        """State and record; of several nets, a tree of those of each, by name."""
        records = [{**dataclasses.asdict(a.history), "run": a.identity} for a in self.accounts]
        if len(records) == 1:
            return self.state, records[0]
        names = [account.directory.name for account in self.accounts]
        trees = map(checkpoint.to_tree, self.experiment.host_states(self.state))
        return tuple(dict(zip(names, each, strict=True)) for each in (trees, records))

    def _tick(self) -> None:
        now = time.monotonic()
        for account in self.accounts:
            account.history.seconds += now - self.clock
        self.clock = now

    def _ask(self, number: int) -> bool:
        """SIGTERM and Ctrl-C ask for a save and a clean end.

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
