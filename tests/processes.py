"""Runs of one or several real processes on this machine, over gloo, as the tests start them."""

import os
import socket
import subprocess
import sys
import time

from resnet_flax.runs import metrics
from tests import conftest

SETTINGS = {
    "model.name": "resnet8",
    "data.batch_size": 32,
    "optim.learning_rate": 0.05,
    "train.total_steps": 24,
    "eval.every_steps": 12,
    "eval.batch_size": 100,  # does not divide the 359 test images
    "checkpoint.every_steps": 4,
    "log.every_steps": 1,
    "log.tensorboard": False,
}
HANG = 600  # Seconds that only a process that hangs needs.


def until(condition, explain=lambda: "waited in vain"):
    """Waits for the condition, however slow the machine is."""
    limit = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < limit, explain()
        time.sleep(0.05)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Processes:
    """Processes started together; killed at the end of a `with` block, should any be left."""

    def __init__(self, commands):
        # The tests' own process splits its CPU, by another variable.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUM_CPU")}
        options = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
        self.children = [
            subprocess.Popen(command, cwd=conftest.ROOT, env=environment, **options)
            for command in commands
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            with child:
                child.kill()

    def finish(self, *indices):
        """[(exit status, stdout, stderr)] of these, or of all."""
        ends = []
        for child in [self.children[i] for i in indices] if indices else self.children:
            out, err = child.communicate(timeout=HANG)
            ends.append((child.returncode, out, err))
        return ends


def flags(config="configs/quickstart.py", **settings):
    """Of a short run, of --config and its keys."""
    values = SETTINGS | settings
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in values.items())]


def begin(workdir, count, settings=(), mode="train"):
    """Starts a run."""
    command = [sys.executable, "-m", "resnet_flax.main", f"--mode={mode}", f"--workdir={workdir}"]
    command += flags(**dict(settings))
    if count == 1:
        return Processes([command])
    command += ["--distributed", f"--coordinator=127.0.0.1:{free_port()}"]
    command += [f"--num_processes={count}"]
    return Processes([*command, f"--process_id={i}"] for i in range(count))


def run(workdir, count, **options):
    """Runs to the end; all processes must succeed. Returns what the first printed."""
    with begin(workdir, count, **options) as running:
        ends = running.finish()
    assert [status for status, _, _ in ends] == [0] * count, ends
    return ends[0][1]


def signal_at_step(workdir, step, index, number, count=2, **options):
    """Starts a run and sends process `index` a signal once this step is on record: all ends."""
    with begin(workdir, count, **options) as running:

        def reached():
            assert all(child.poll() is None for child in running.children), running.finish()
            return any(r["step"] >= step for r in records(workdir, "train"))

        until(reached)
        running.children[index].send_signal(number)
        return running.finish()


def records(workdir, split):
    return metrics.of_split(metrics.read_records(workdir / "metrics.jsonl"), split)


def losses(workdir):
    return [r["loss"] for r in records(workdir, "train")]
