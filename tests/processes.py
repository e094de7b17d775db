"""Runs of one or several real processes on this machine, over gloo, as the tests start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from tests import conftest

SETTINGS = {
    "model.name": "resnet8",
    "data.batch_size": 32,
    "optim.learning_rate": 0.05,
    "train.total_steps": 60,
    "eval.every_steps": 30,
    "eval.batch_size": 100,  # does not divide the 359 test images
    "checkpoint.every_steps": 10,
    "log.every_steps": 1,
    "log.tensorboard": False,
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Processes of one run; killed at the end of a `with` block, should any be left."""

    def __init__(self, workdir, count, *flags, settings=(), mode="train", each=None):
        self.workdir, self.count = workdir, count
        values = SETTINGS | dict(settings)
        command = [sys.executable, "-m", "resnet_flax.main", f"--mode={mode}"]
        command += ["--config=configs/quickstart.py", f"--workdir={workdir}", *flags]
        command += [f"--config.{key}={value}" for key, value in values.items()]
        if count > 1:
            command += ["--distributed", f"--coordinator=127.0.0.1:{free_port()}"]
            command += [f"--num_processes={count}"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUM_CPU")}
        self.children = []
        for i in range(count):
            own = [f"--process_id={i}"] if count > 1 else []
            self.children.append(
                subprocess.Popen(
                    [*command, *own, *(each or {}).get(i, [])],
                    cwd=conftest.ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            child.stdout.close()
            child.stderr.close()

    def wait_for_step(self, step, timeout=120):
        """Returns once this step of training is on record."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if max((r["step"] for r in records(self.workdir, "train")), default=0) >= step:
                return
            assert all(child.poll() is None for child in self.children), self.finish()
            time.sleep(0.02)
        raise AssertionError(f"no step {step} within {timeout} s")

    def signal(self, index, number):
        self.children[index].send_signal(number)

    def finish(self, timeout=120):
        """[(exit status, stdout, stderr)] of all."""
        ends = []
        for child in self.children:
            out, err = child.communicate(timeout=timeout)
            ends.append((child.returncode, out, err))
        return ends


def run(workdir, count, *flags, **options):
    """Runs to the end; all processes must succeed. Returns what the first printed."""
    with Processes(workdir, count, *flags, **options) as processes:
        ends = processes.finish()
    assert [status for status, _, _ in ends] == [0] * count, ends
    return ends[0][1]


def records(workdir, split):
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    parsed = []
    for line in lines:
        try:
            parsed.append(json.loads(line))
        except ValueError:
            continue  # Just being written.
    return [r for r in parsed if r["split"] == split]


def losses(workdir):
    return [r["loss"] for r in records(workdir, "train")]


KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
