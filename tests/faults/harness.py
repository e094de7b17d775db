"""Real training processes, hit at chosen moments, and the comparison with an undisturbed run."""

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

from resnet_flax.runs import checkpoint, metrics
from tests.conftest import ROOT

STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 5, 10
FLAGS = (
    "--config=configs/quickstart.py",
    "--config.model.name=resnet8",
    "--config.data.batch_size=8",
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
        """It ended with an error that contains these; `noise`: libraries may complain before it."""
        assert self.code == 1, (self.code, self.err)
        assert noise or "Traceback" not in self.err, self.err
        lines = self.err.splitlines()
        assert any(line.startswith("error: ") for line in lines[-2:]), self.err
        error = self.err[self.err.rindex("error: ") :]
        for message in messages:
            assert message in error, self.err


class Run:
    """A run's directory and the processes started on it."""

    outcome: Outcome  # Of an undisturbed run's one process.

    def __init__(self, directory: pathlib.Path, devices: int = 2, *flags: str, logs=None):
        """`logs` is a folder for what the processes print (default: beside the directory)."""
        self.directory, self.starts = directory, 0
        self._logs = logs or directory.parent / f"{directory.name}.logs"
        self._flags = (*FLAGS, f"--config.train.cpu_devices={devices}", *flags)

    def start(self, *flags: str, **options) -> "Process":
        """Starts training; `options` are those of `Process`."""
        self.starts += 1
        flags = (*self._flags, f"--workdir={self.directory}", *flags)
        return Process(flags, self._logs / str(self.starts), **options)

    def finish(self, *flags: str, **options) -> Outcome:
        """Starts training and waits for its end."""
        return self.start(*flags, **options).wait()

    def finish_as(self, reference: "Run", **options) -> None:
        """Trains to the end, which must be the same as the reference's."""
        self.finish(**options).assert_finished()
        assert_same_end(self, reference)

    def kill(self, moment: Callable[[], bool]) -> None:
        """Starts training and kills it at a moment."""
        process = self.start()
        assert process.hit(signal.SIGKILL, moment), "ended before it could be killed"
        assert process.wait().code == -signal.SIGKILL

    def checkpoints(self) -> list[int]:
        return checkpoint.steps_in(self.directory / "checkpoints")

    def records(self) -> list[dict]:
        return metrics.read_records(self.directory / "metrics.jsonl")

    def resumed_from(self) -> list[int]:
        return [s["step"] for s in json.loads(self.read("run.json"))["starts"]]

    def saves(self) -> list[str]:
        """Names in the directory of checkpoints, finished or not."""
        try:
            return os.listdir(self.directory / "checkpoints")
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


class Process:
    """A process of `resnet_flax.main`, whose output goes to files: it never waits for a reader."""

    def __init__(self, flags, logs: pathlib.Path, env=None, remove=(), shell="", **options):
        """Starts it.

        Args:
          flags: of the command.
          logs: folder for its output.
          env: environment variables to set.
          remove: environment variables to take away.
          shell: a line of a shell that comes first: "ulimit -f 200".
          **options: of `subprocess.Popen`; `stdout` and `stderr` in place of files.
        """
        command = [sys.executable, "-m", "resnet_flax.main", *flags]
        logs.mkdir(parents=True)
        self._logs = logs
        environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | (env or {})
        environment = {k: v for k, v in environment.items() if k not in remove}
        if shell:
            command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
        with open(logs / "out", "wb") as out, open(logs / "err", "wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                **{"stdout": out, "stderr": err} | options,
            )

    def hit(self, number: signal.Signals | None, moment: Callable[[], bool], delay=0.0) -> bool:
        """Sends a signal `delay` seconds after a moment; None: leaves the process halted.

        False where the process ended before.
        """
        # Halted first, so that the moment has not passed when the signal comes.
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
    return Process(["--mode=evaluate", *flags], logs, **options).wait()


def assert_same_state(run: Run, reference: Run) -> None:
    """Equal to the bit: parameters, statistics, momentum, and the weights file."""
    trees = [checkpoint.read(r.directory / "checkpoints" / str(STEPS))[0] for r in (run, reference)]
    files = [safetensors.numpy.load(r.read("weights.safetensors")) for r in (run, reference)]
    for a, b in (trees, files):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_finite(run: Run) -> None:
    for step in run.checkpoints():
        tree, _ = checkpoint.read(run.directory / "checkpoints" / str(step))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def assert_same_end(run: Run, reference: Run) -> None:
    """The same state, records and result, and no litter."""
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
    # The last but one may be where the run was told to stop.
    assert run.checkpoints()[-1] == reference.checkpoints()[-1]
    assert len(run.checkpoints()) == len(reference.checkpoints())
    here, known = ({p.name for p in r.directory.iterdir()} for r in (run, reference))
    assert here - {"metrics.superseded.jsonl", "damaged_checkpoints"} == known
    assert all(n.isdigit() for n in run.saves())


def _timeless(record: dict) -> dict:
    return {k: v for k, v in record.items() if k != "images_per_second"}
