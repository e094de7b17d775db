"""Real training processes, hit at chosen moments, and the comparison with an undisturbed run.

A moment is a predicate of what lies in the run's directory, so the machine's speed does not matter:
the process is halted (SIGSTOP) when the predicate holds, and what is to happen to it happens only
if it still holds then.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import safetensors.numpy

from resnet_flax import checkpoint, metrics
from tests.conftest import ROOT

STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 5, 10
FLAGS = (
    "--config=configs/quickstart.py",
    "--config.model.name=resnet8",
    "--config.data.batch_size=32",
    f"--config.train.total_steps={STEPS}",
    f"--config.eval.every_steps={EVALUATE_EVERY}",
    f"--config.checkpoint.every_steps={SAVE_EVERY}",
    "--config.log.every_steps=1",
    "--config.log.tensorboard=False",
)
TIMEOUT = 240  # seconds; a process that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: exit status (negative: by a signal) and what it printed."""

    code: int
    out: str
    err: str

    def assert_finished(self) -> None:
        assert self.code == 0, self.err
        assert "% test error" in self.out
        assert "Traceback" not in self.err

    def assert_refused(self, *messages: str, noise=False) -> None:
        """It ended with a documented error of a few lines, not a traceback.

        Args:
          *messages: what the error must contain.
          noise: allow libraries to have complained before, in their own words.
        """
        assert self.code == 1, (self.code, self.err)
        assert noise or "Traceback" not in self.err, self.err
        lines = self.err.splitlines()
        assert any(line.startswith("error: ") for line in lines[-2:]), self.err
        error = self.err[self.err.rindex("error: ") :]
        for message in messages:
            assert message in error, self.err


class Run:
    """A run's directory and the processes started on it.

    Attributes:
      directory: the run's.
      starts: processes started so far.
    """

    def __init__(self, directory: pathlib.Path, devices: int = 2, *flags: str, logs=None):
        """Names it; `logs` is a folder for what the processes print (default: beside it)."""
        self.directory, self.starts = directory, 0
        self._logs = logs or directory.parent / f"{directory.name}.logs"
        self._flags = (*FLAGS, f"--config.train.cpu_devices={devices}", *flags)

    def arguments(self, *flags: str) -> list[str]:
        where = f"--workdir={self.directory}"
        return [sys.executable, "-m", "resnet_flax.main", *self._flags, where, *flags]

    def start(self, *flags: str, **options) -> "Process":
        """Starts training; `options` are those of `Process`."""
        self.starts += 1
        return Process(self.arguments(*flags), self._logs / str(self.starts), **options)

    def finish(self, *flags: str, **options) -> Outcome:
        """Starts training and waits for its end."""
        return self.start(*flags, **options).wait()

    def checkpoints(self) -> list[int]:
        return checkpoint.steps_in(self.directory / "checkpoints")

    def records(self) -> list[dict]:
        return metrics.read_records(self.directory / "metrics.jsonl")

    def resumed_from(self) -> list[int]:
        return [s["step"] for s in json.loads(self.read("run.json"))["starts"]]

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


class Process:
    """A process whose output goes to files: nobody needs to read it for it to go on."""

    def __init__(self, arguments, logs: pathlib.Path, env=None, remove=(), shell="", **options):
        """Starts it.

        Args:
          arguments: of the command.
          logs: folder for its output.
          env: environment variables to set.
          remove: environment variables to take away.
          shell: a line of a shell that comes first: "ulimit -f 200".
          **options: of `subprocess.Popen`; `stdout` and `stderr` in place of files.
        """
        logs.mkdir(parents=True)
        self._logs = logs
        environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | (env or {})
        environment = {k: v for k, v in environment.items() if k not in remove}
        if shell:
            arguments = ["sh", "-c", f'{shell}; exec "$@"', "sh", *arguments]
        with open(logs / "out", "wb") as out, open(logs / "err", "wb") as err:
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                **{"stdout": out, "stderr": err} | options,
            )

    def hit(self, number: signal.Signals | None, moment: Callable[[], bool], delay=0.0) -> bool:
        """Sends a signal at a moment; None: leaves the process halted.

        Args:
          number: the signal.
          moment: whether it is the moment.
          delay: seconds to wait from then on.

        Returns:
          False where the process ended before.
        """
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "the moment never came"
            if not moment():
                time.sleep(0.0005)
                continue
            if delay:
                time.sleep(delay)
            self.process.send_signal(signal.SIGSTOP)
            while self._state() not in "TZX":
                time.sleep(0.0005)
            if self.process.poll() is None and (delay or moment()):
                if number is not None:
                    self.process.send_signal(number)
                    self.process.send_signal(signal.SIGCONT)
                return True
            self.process.send_signal(signal.SIGCONT)
        return False

    def _state(self) -> str:
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat")
        return stat.read_text().rpartition(") ")[2][0] if stat.exists() else "X"

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def wait(self) -> Outcome:
        try:
            code = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"hangs; it has said: {self._said('err')[-2000:]}") from None
        return Outcome(code, self._said("out"), self._said("err"))

    def _said(self, stream: str) -> str:
        return (self._logs / stream).read_text(errors="replace")


def evaluate(*flags: str, logs: pathlib.Path, **options) -> Outcome:
    """Runs `--mode=evaluate`."""
    command = [sys.executable, "-m", "resnet_flax.main", "--mode=evaluate", *flags]
    return Process(command, logs, **options).wait()


# Moments: functions from a run to a predicate.


def claimed(run: Run):
    return (run.directory / ".lock").exists


def begun(run: Run):
    """What the run is has been written; compilation comes next."""
    return (run.directory / "run.json").exists


def compiling(run: Run):
    """The log is there, and empty: signals are expected from about here."""
    return lambda: (run.directory / "metrics.jsonl").exists() and not run.records()


def at_step(run: Run, step: int):
    return lambda: any(r["step"] >= step for r in run.records())


def saving(run: Run, after: int = 0):
    """Orbax is writing, into a directory that it will rename."""
    return lambda: any(".orbax-checkpoint-tmp" in n and _step(n) > after for n in _saves(run))


def unlisted(run: Run, after: int = 0):
    """Orbax is done, but the list of files has not been written."""

    def check():
        names = (n for n in _saves(run) if n.isdigit() and int(n) > after)
        return any(not (run.directory / "checkpoints" / n / "files.json").exists() for n in names)

    return check


def evaluating(run: Run, after: int = 0):
    """The steps before a due evaluation are recorded, its scores are not."""

    def check():
        records = run.records()
        last = records[-1] if records else {"step": 0, "split": ""}
        due = last["step"] > after and last["step"] % EVALUATE_EVERY == 0
        return due and last["split"] == "train"

    return check


def ending(run: Run):
    """All is trained and scored, the result not written."""

    def check():
        scored = any(r["step"] == STEPS and r["split"] == "test" for r in run.records())
        return scored and not (run.directory / "result.json").exists()

    return check


def _saves(run: Run) -> list[str]:
    try:
        return os.listdir(run.directory / "checkpoints")
    except FileNotFoundError:
        return []


def _step(name: str) -> int:
    return int(name.partition(".")[0])


def describe(run: Run) -> str:
    """Where a run stands, in words: for the log."""
    if not run.directory.exists():
        return "no directory yet"
    records = run.records()
    at = f"after step {records[-1]['step']}" if records else "before the first step"
    partial = [n for n in _saves(run) if not n.isdigit()]
    saved = [n for n in _saves(run) if n.isdigit()]
    bare = [n for n in saved if not (run.directory / "checkpoints" / n / "files.json").exists()]
    return at + "".join(
        [f", {n} there" for n in partial] + [f", checkpoint {n} without its list" for n in bare]
    )


def assert_same_state(run: Run, reference: Run) -> None:
    """Equal to the bit: parameters, statistics, momentum, and the weights file."""
    trees = [checkpoint.read(r.directory / "checkpoints" / str(STEPS))[0] for r in (run, reference)]
    files = [safetensors.numpy.load(r.read("weights.safetensors")) for r in (run, reference)]
    for a, b in (trees, files):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_finite(run: Run) -> None:
    """Every number of every checkpoint is."""
    for step in run.checkpoints():
        tree, _ = checkpoint.read(run.directory / "checkpoints" / str(step))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def assert_same_end(run: Run, reference: Run) -> None:
    """The same state, records and result, and nothing left half-written."""
    assert_same_state(run, reference)
    curves = [[_timeless(x) for x in r.records()] for r in (run, reference)]
    assert curves[0] == curves[1]
    assert len(run.read("metrics.jsonl").splitlines()) == STEPS + STEPS // EVALUATE_EVERY
    results = [json.loads(r.read("result.json")) for r in (run, reference)]
    for key in ("test_error_last", "test_loss_last", "train_error_last", "test_confusion_last"):
        assert results[0][key] == results[1][key]
    assert results[0]["seconds"] > 0
    assert run.read("config.json") == reference.read("config.json")
    assert run.read("preprocess.safetensors") == reference.read("preprocess.safetensors")
    # No litter: nothing temporary, nothing half-written.
    assert run.checkpoints() == reference.checkpoints()
    here, known = ({p.name for p in r.directory.iterdir()} for r in (run, reference))
    assert here - {"metrics.superseded.jsonl", "damaged_checkpoints"} == known
    assert all(n.isdigit() for n in _saves(run))


def _timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if k != "images_per_second"}
