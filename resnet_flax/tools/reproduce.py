"""Makes the runs behind the papers' tables on CIFAR-10.

    python -m resnet_flax.tools.reproduce table6 --seeds=5 --workdir=runs/paper
    python -m resnet_flax.tools.reproduce all --workdir=runs/paper --dry_run
    python -m resnet_flax.tools.reproduce plain --scale=0.001 --seeds=2 --workdir=runs/trial

Each is an ordinary run of resnet_flax.main in WORKDIR/<row>/seed<k>; its output goes to log.txt
there. Finished runs are skipped, interrupted ones resume, failed ones are reported at the end.
Whatever ends the command, the same command goes on. Several of them may share a directory (with
CUDA_VISIBLE_DEVICES=0, =1, ... on a machine with several GPUs, or on machines with a shared file
system that supports locks): each takes the next run that no other is at.

Experiments: table6 (ResNet-20 to 110), plain, options (shortcuts A, B, C), bottleneck, preact,
shortcuts and activations (Identity Mappings, Tables 1 and 2), modern, all. --config.KEY=VALUE
changes a setting of all runs, for example --config.data.split=45k/5k.
"""

import argparse
import contextlib
import functools
import itertools
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import time
from typing import IO

from resnet_flax.errors import UserError, first_line
from resnet_flax.signals import answered_by
from resnet_flax.tools import entry
from resnet_flax.tools.experiments import Run, lock, make_runs, plan, rows_of
from resnet_flax.training import inputs

# Seconds between looks at processes and runs, and between summaries.
_LOOK, _SUM_UP = 2.0, 60.0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Runner:
    """Makes runs in order, `jobs` processes side by side, and records how each ends.

    A process that makes a run inherits the lock on the run's log.txt, and keeps it even if this
    one is killed. A run held by another process is looked at again until it is finished, or free
    and resumed here. So each of several runners ends when all runs are finished.
    """

    def __init__(self, runs: list[Run], *, jobs: int = 1, seeds_per_run: int = 1):
        """Starts nothing yet."""
        self.done: dict[str, dict] = {}  # results of finished runs, by name
        self.failed: dict[str, str] = {}  # why, with the end of the log, by name
        self.stop_signal = 0  # the signal that stopped everything
        self._runs, self._jobs, self._seeds_per_run = runs, jobs, seeds_per_run
        self._left = {run.name: run for run in runs}
        self._processes: dict[subprocess.Popen, list[Run]] = {}  # a run, or several seeds of a row
        self._signals = queue.SimpleQueue[int]()
        self._say_once = functools.cache(_say)

    def run(self) -> None:
        """Returns when every run has ended, or has saved and stopped after a signal."""
        next_summary = time.monotonic() + _SUM_UP
        with answered_by(self._signals.put, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            while self._processes or (self._left and not self.stop_signal):
                for process in [p for p in self._processes if p.poll() is not None]:
                    self._reap(process.returncode, self._processes.pop(process))
                if not self.stop_signal and len(self._processes) < self._jobs:
                    self._fill_up()
                if time.monotonic() >= next_summary:
                    next_summary += _SUM_UP
                    self._sum_up()
                with contextlib.suppress(queue.Empty):
                    self._stop(self._signals.get(timeout=_LOOK))

    def find_finished(self) -> None:
        """Notes which runs are done, and which cannot be made."""
        for run in list(self._left.values()):
            try:
                if result := run.result():
                    del self._left[run.name]
                    self.done[run.name] = result
            except UserError as error:
                self._note_failed(run, f"cannot be made: {error}")

    def _fill_up(self) -> None:
        self.find_finished()
        for run in list(self._left.values()):
            if run.name in self._left and len(self._processes) < self._jobs:
                try:
                    self._start(run)
                except OSError as error:
                    self._note_failed(run, f"failed: {error.filename}: {first_line(error)}")

    def _start(self, first: Run) -> None:
        # In one process: the run, and the seeds after it as far as they are free.
        with contextlib.ExitStack() as stack:
            logs = {}
            for seed in range(first.config.seed, first.config.seed + self._seeds_per_run):
                run = self._left.get(f"{first.row}/seed{seed}")
                if run is None:
                    break
                run.directory.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(open(run.directory / "log.txt", "ab"))
                if not lock(log) or run.is_running():
                    self._say_once(f"{run.name}: another process is at it")
                    break
                logs[run] = log
            if logs:
                self._processes[self._begin(logs)] = list(logs)
        for run in logs:
            del self._left[run.name]

    def _begin(self, logs: dict[Run, IO[bytes]]) -> subprocess.Popen:
        first, output = next(iter(logs.items()))
        arguments = first.command(len(logs))
        for run, log in logs.items():
            log.write(f"$ {shlex.join(arguments)}  # output in {output.name}\n".encode())
            log.flush()
            step = run.last_step()
            _say(f"{run.name}: {f'goes on; it had come to step {step}' if step else 'begins'}")
        # Else the first of several processes takes three quarters of a GPU's memory.
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if self._jobs > 1 else {}
        return subprocess.Popen(
            [sys.executable, *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[log.fileno() for log in logs.values()],  # And so the locks.
            env=shared | os.environ,
            start_new_session=True,  # A terminal's Ctrl-C comes once, from here.
        )

    def _reap(self, status: int, runs: list[Run]) -> None:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        log = (runs[0].directory / "log.txt").read_text(errors="replace")
        _, _, said = log.rpartition("$ python -m resnet_flax.main ")
        end = [line for line in said.splitlines()[1:] if line.strip()][-12:]
        for run in runs:
            if result := run.result():
                self.done[run.name] = result
                _say(f"{run.name}: done, test error {100 * result['test_error_last']:.2f} %")
            elif run.is_running():
                self._left[run.name] = run  # Another process was faster.
            elif self.stop_signal:
                _say(f"{run.name}: stopped after step {run.last_step()}")
            else:
                self._note_failed(run, "\n".join([f"failed: {how}", *end]))

    def _note_failed(self, run: Run, reason: str) -> None:
        self._left.pop(run.name, None)
        self.failed[run.name] = reason
        _say(f"{run.name} {reason}")

    def _sum_up(self) -> None:
        self.find_finished()
        status, total = plan(self._runs, self.done, self._jobs)
        for run in itertools.chain(*self._processes.values()):
            _say(f"{run.name}: {status[run.name]}")
        _say(total)

    def _stop(self, number: int) -> None:
        # A run does not save on SIGHUP.
        self.stop_signal = signal.SIGTERM if number == signal.SIGHUP else number
        _say(f"{signal.Signals(self.stop_signal).name}: saving and stopping")
        for process in self._processes:
            process.send_signal(self.stop_signal)


def finish(runner: Runner, workdir: pathlib.Path) -> None:
    """Prints how it all ended; exits with a status other than 0 unless all runs are finished."""
    if runner.stop_signal:
        print("Stopped; all is saved. The same command goes on from there.")
        sys.exit(128 + runner.stop_signal)
    if runner.failed:
        for name, reason in runner.failed.items():
            _say(f"\n{name} {reason}")
        _say(f"\n{len(runner.done)} runs are done, {len(runner.failed)} failed")
        sys.exit(1)
    report = f"python -m resnet_flax.tools.report {workdir} --out={workdir}/report"
    print(f"All {len(runner.done)} runs are done. Next:\n  {report}")


def _choose_jobs(asked: int | None) -> int:
    # Another process asks jax: in this one it would keep a part of the GPU.
    asking = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found = subprocess.run(asking, env=environment, capture_output=True, check=False).stdout
    if found.strip() != b"gpu":
        return asked or 1
    jobs = asked or 4  # A net for CIFAR alone leaves most of a GPU idle.
    pipes = pathlib.Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if jobs > 1 and not (pipes / "control").exists():
        _say(
            "note: under NVIDIA MPS processes share a GPU almost twice as fast; to start it, stop "
            "this, run `nvidia-cuda-mps-control -d`, and give the same command again"
        )
    return jobs


def _parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = entry.parser(__doc__)
    add = parser.add_argument
    add("experiment", help="one of the above")
    add("--workdir", default="runs/paper", help="of all runs; default: %(default)s")
    add("--seeds", type=int, default=5, help="of each net; default: %(default)s")
    add("--jobs", type=int, help="processes side by side; default: 4 on a GPU, else 1")
    add("--seeds_per_run", type=int, default=1, help="that one process trains; default: 1")
    add("--scale", type=float, default=1.0, help="shorten all runs, for a trial")
    add("--dry_run", action="store_true", help="say what there is to do")
    add("--with_1202", action="store_true", help="ResNet-1202 too")
    add("--data_dir", help="short for --config.data.data_dir")
    add("--part", default="1/1", help="I/N: only every N-th run, where there are no locks")
    args, rest = parser.parse_known_args(argv)
    for flag in ("seeds", "jobs", "seeds_per_run"):
        if (number := getattr(args, flag)) is not None and number < 1:
            raise UserError(f"--{flag}={number} must be at least 1")
    if "://" in args.workdir:
        raise UserError(f"--workdir={args.workdir} must be a local directory")
    overrides = {"data.data_dir": args.data_dir} if args.data_dir else {}
    for item in rest:
        key, equals, value = item.removeprefix("--config.").partition("=")
        if not item.startswith("--config.") or not equals:
            raise UserError(f"unrecognized argument {item}; see --help")
        overrides[key] = value
    return args, overrides


def _part(runs: list[Run], text: str) -> list[Run]:
    number, _, parts = text.partition("/")
    if number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts):
        return runs[int(number) - 1 :: int(parts)]
    raise UserError(f"--part={text} must be like 1/4: the first of four parts")


def main(argv: list[str]) -> None:
    """Makes the runs, or lists them."""
    args, overrides = _parse(argv)
    rows = rows_of(args.experiment, with_1202=args.with_1202)
    workdir = pathlib.Path(args.workdir).expanduser()
    runs = make_runs(rows, workdir, seeds=args.seeds, scale=args.scale, overrides=overrides)
    runs = _part(runs, args.part)
    jobs = _choose_jobs(args.jobs)
    runner = Runner(runs, jobs=jobs, seeds_per_run=args.seeds_per_run)
    if args.dry_run:
        runner.find_finished()
        status, total = plan(runs, runner.done, jobs)
        for run in runs:
            print(f"{run.name}: {status[run.name]}\n    {shlex.join(run.command())}")
        print(total)
        return
    if not all((run.directory / "result.json").exists() for run in runs):
        # What is wrong with the data is said once, before anything begins.
        inputs.load_data(runs[0].config)
    runner.run()
    finish(runner, workdir)


if __name__ == "__main__":
    entry.run(main)
