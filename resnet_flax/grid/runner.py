"""Makes the runs of a grid, each in a process of its own."""

import os
import pathlib
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable
from typing import IO, NamedTuple

from resnet_flax.errors import UserError
from resnet_flax.grid import locks
from resnet_flax.grid.plan import Job, State, last_step, state_of
from resnet_flax.signals import answered_by

# Seconds between looks at the processes, and at runs that others hold.
_LOOK, _LOOK_AT_OTHERS = 0.2, 5.0
# Lines of a failed run's log that are shown.
_SHOWN_LINES = 12


class _Active(NamedTuple):
    job: Job
    process: subprocess.Popen
    lock: IO
    log: pathlib.Path
    log_start: int


class Runner:
    """Starts jobs, a number of them side by side, and keeps account of how each ends.

    A run that another process holds (another runner, on this machine or one that shares the
    directory, or a `resnet_flax.main`) is left to it, and looked at again once all others are done:
    by then it has ended well, or it is taken over. So several runners on one directory share its
    jobs, and each ends when all are done.

    Attributes:
      done: results of the runs that are done, by name.
      failed: why, and the end of the log, by name.
      stop_signal: the signal that has ended it all, or 0.
    """

    def __init__(
        self,
        jobs: list[Job],
        directory: pathlib.Path,
        *,
        parallel: int,
        say: Callable[[str], None],
        tick: Callable[["Runner"], None] = lambda runner: None,
    ):
        """Starts nothing yet.

        Args:
          jobs: in the order in which they are to be begun.
          directory: the grid's; locks lie there.
          parallel: how many run side by side.
          say: told what begins and ends.
          tick: called a few times a second.
        """
        if parallel < 1:
            raise UserError(f"--jobs={parallel} must be at least 1")
        self.jobs, self.done, self.failed, self.stop_signal = jobs, {}, {}, 0
        self._directory, self._parallel, self._say, self._tick = directory, parallel, say, tick
        self._waiting, self._held = deque(jobs), deque[Job]()
        self._active: list[_Active] = []
        self._next_look = 0.0
        self._told: set[str] = set()

    @property
    def active(self) -> list[Job]:
        """The jobs that run now."""
        return [active.job for active in self._active]

    def share(self, job: Job) -> float:
        """How much of a job is done, by whomever, 0 to 1."""
        shares = [self._share(run) for run in job.runs]
        return sum(shares) / len(shares)

    def _share(self, run: Job) -> float:
        if run.name in self.done:
            return 1.0
        return min(1.0, last_step(run.directory) / run.steps) if run.steps else 0.0

    def run(self) -> None:
        """Makes all runs, or ends with all of them saved after a signal."""
        if not locks.are_supported(self._directory):
            self._say(
                f"the file system of {self._directory} has no locks: let one process at a time "
                "work there, or give each its own --part"
            )
        said = False
        with answered_by(self._stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            try:
                while self._begin() or self._active or (self._held and not self.stop_signal):
                    self._tick(self)
                    time.sleep(_LOOK)
                    self._reap()
                    if self.stop_signal and not said:
                        said = True
                        self._say(f"{signal.Signals(self.stop_signal).name}: saving and stopping")
            finally:
                # Only a bug or an unwritable disk leads here with processes left.
                for active in self._active:
                    active.process.terminate()
                for active in self._active:
                    active.process.wait()
                    active.lock.close()

    def _begin(self) -> bool:
        """Starts what there is room for; returns whether some jobs have not been tried yet."""
        while self._waiting and len(self._active) < self._parallel and not self.stop_signal:
            self._take(self._waiting.popleft())
        if self._held and not self.stop_signal and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_AT_OTHERS
            for _ in range(len(self._held)):
                job = self._held.popleft()
                if len(self._active) < self._parallel:
                    self._take(job)
                elif not self._is_done(job, state_of(job)):
                    self._held.append(job)
        return bool(self._waiting) and not self.stop_signal

    def _take(self, job: Job) -> None:
        if self._is_done(job, state_of(job)):
            return
        lock = locks.hold(self._directory / ".locks" / job.name.replace("/", "-"))
        if lock is None or self._is_held(job):
            if lock:
                lock.close()
            self._leave(job)
            return
        # Nobody else changes it any more.
        state = state_of(job)
        if self._is_done(job, state) or state.refusal:
            lock.close()
            if state.refusal:
                self._fail(job, state.refusal)
            return
        self._told.discard(job.name)
        step = min(last_step(run.directory) for run in job.runs)
        try:
            self._active.append(self._start(job, lock))
        except OSError as error:
            lock.close()
            self._fail(job, f"{error.strerror}: {error.filename}")
            return
        if self.stop_signal:
            self._active[-1].process.send_signal(self.stop_signal)
        self._say(f"{job.name}: {f'goes on; it had come to step {step}' if step else 'begins'}")

    def _start(self, job: Job, lock: IO) -> _Active:
        job.directory.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            log.write(f"$ {job.shown_command}\n".encode())
            log.flush()
            # In a session of its own: a terminal's Ctrl-C comes once, from here.
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
            return _Active(job, process, lock, job.log, log.tell())

    def _environment(self) -> dict[str, str]:
        if self._parallel == 1:
            return dict(os.environ)
        # Else the first process would take three quarters of a GPU's memory.
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}

    def _leave(self, job: Job) -> None:
        self._held.append(job)
        if job.name not in self._told:
            self._told.add(job.name)
            self._say(f"{job.name}: another process is at it")

    def _is_done(self, job: Job, state: State) -> bool:
        for run, result in zip(job.runs, state.results, strict=False):
            self.done[run.name] = result
        return bool(state.results)

    def _is_held(self, job: Job) -> bool:
        """Whether a process is at it, or at one of its runs."""
        return any(locks.is_held(run.directory / ".lock") for run in job.runs)

    def _fail(self, job: Job, reason: str) -> None:
        self.failed[job.name] = reason
        self._say(f"{job.name}: failed; the others go on")

    def _reap(self) -> None:
        ended = [active for active in self._active if active.process.poll() is not None]
        for active in ended:
            self._active.remove(active)
            job, status, state = active.job, active.process.returncode, state_of(active.job)
            active.lock.close()
            if self._is_done(job, state):
                errors = [f"{100 * result['test_error_last']:.2f} %" for result in state.results]
                self._say(f"{job.name}: done, test error {', '.join(errors)}")
            elif self._is_held(job):
                self._leave(job)
            elif self.stop_signal:
                self._say(f"{job.name}: stopped after step {state.step}")
            else:
                self._fail(job, f"{_describe(status)}\n{_tail(active.log, active.log_start)}")

    def _stop(self, number: int) -> bool:
        """Hands a signal on to the runs, which save and stop."""
        # A run has no way to save on SIGHUP.
        self.stop_signal = signal.SIGTERM if number == signal.SIGHUP else number
        for active in list(self._active):
            active.process.send_signal(self.stop_signal)
        return False


def _describe(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return "stopped by a signal" if status == 0 else f"exit status {status}"


def _tail(path: pathlib.Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"{path}: {error.strerror}"
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-_SHOWN_LINES:])
