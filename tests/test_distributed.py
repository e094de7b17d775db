"""Several real processes: the same numbers as one, one end for all, and nothing left hanging."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest

from configs import quickstart
from resnet_flax.config import flatten
from resnet_flax.devices import cpu, distributed, hardware
from resnet_flax.devices.place import Place, find_place
from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint
from resnet_flax.training import train
from tests import conftest, processes

CPU = {"train.cpu_devices": 1}


def assert_same_curve(a, b):
    """As near as float32 allows: training amplifies the last bits of sums, measured to 0.011."""
    assert len(a) == len(b) == processes.SETTINGS["train.total_steps"]
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_allclose(a[:10], b[:10], rtol=3e-3)
    np.testing.assert_allclose(a, b, rtol=3e-2)


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """An uninterrupted run of one process, this one, with two devices."""
    config = quickstart.get_config()
    config.update_from_flattened_dict(processes.SETTINGS | {"train.cpu_devices": 2})
    directory = tmp_path_factory.mktemp("undivided") / "run"
    train.train(config, directory)
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes, stopped and resumed, and what the first printed at each end."""
    directory = tmp_path_factory.mktemp("two") / "run"
    # SIGTERM to either process stops both at one step, and saves.
    ends = processes.signal_at_step(directory, 6, 1, signal.SIGTERM, settings=CPU)
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert not (directory / "result.json").exists()
    with processes.begin(directory, 2, settings=CPU) as running:
        (status, said, _), other = running.finish()
    # Of the second one nothing is heard, nor of JAX in it.
    assert (status, other[0], other[2]) == (0, 0, "")
    return directory, ends[0][1], said


def end_of(directory):
    """The last checkpoint's step, and what it holds."""
    step = checkpoint.steps_in(directory / "checkpoints")[-1]
    return step, checkpoint.read(directory / "checkpoints" / str(step))[0]


def test_two_processes_stopped_and_resumed_learn_what_one_learns_with_two_devices(undivided, two):
    directory, stopped, said = two
    (step,) = map(int, re.findall(r"Stopped by SIGTERM at step (\d+);", stopped))
    assert 6 <= step < 24
    assert_same_curve(processes.losses(directory), processes.losses(undivided))
    results = [json.loads((d / "result.json").read_text()) for d in (undivided, directory)]
    assert abs(results[0]["test_error_last"] - results[1]["test_error_last"]) < 0.05
    # Every one of the 359 images exactly once, in batches of 100.
    assert results[1]["test_examples"] == np.sum(results[1]["test_confusion_last"]) == 359
    assert "resnet8 on digits" in said
    assert "2 device(s)" in results[1]["hardware"]
    assert results[1]["processes"] == 2


def test_the_first_process_writes(two):
    directory, _, _ = two
    for split in ("train", "test"):
        steps = [r["step"] for r in processes.records(directory, split)]
        assert steps == sorted(set(steps))
    assert len(json.loads((directory / "run.json").read_text())["starts"]) == 2
    assert {p.name for p in directory.iterdir()} >= {"curves.png", "weights.safetensors"}


@pytest.mark.slow
def test_a_run_whose_process_was_killed_goes_on_as_if_nothing_had_happened(two, tmp_path):
    ends = processes.signal_at_step(tmp_path, 6, 1, signal.SIGKILL, settings=CPU)
    assert ends[0][0] == 1
    assert "error: process 1 (" in ends[0][2]
    assert "has gone; the same command, run again, goes on" in ends[0][2]
    assert "Traceback" not in ends[0][2]
    processes.run(tmp_path, 2, settings=CPU)
    jax.tree.map(np.testing.assert_array_equal, end_of(tmp_path), end_of(two[0]))
    assert processes.losses(tmp_path) == processes.losses(two[0])


def test_all_print_an_error(two, tmp_path):
    shutil.copytree(two[0], tmp_path / "run")
    settings = CPU | {"optim.momentum": 0.8}
    with processes.begin(tmp_path / "run", 2, settings=settings) as running:
        ends = running.finish()
    for status, _, error in ends:
        assert status == 1
        assert "belongs to a run of another config" in error
        assert "optim.momentum: 0.9 -> 0.8" in error
        assert "Traceback" not in error
    assert "process 0 failed: workdir" in ends[1][2]


def test_other_flags_and_versions_are_refused(monkeypatch):
    config, other = conftest.make_small_config(), conftest.make_small_config()
    other.optim.learning_rate, other.data.data_dir = 0.2, "elsewhere"
    other_flag = "process 1 was started with --config.optim.learning_rate=0.2, process 0 with 0.1"
    for key, value, message in (
        ("config", json.dumps(flatten(other)), other_flag),
        ("jax", "0.1", f"process 1 runs jax 0.1, process 0 jax {jax.__version__}"),
    ):
        gather = lambda here, change={key: value}: [here, here | change]  # noqa: E731
        monkeypatch.setattr(distributed, "gather", gather)
        with pytest.raises(UserError, match=message):
            hardware.choose_mesh(config)


# How they find each other, hear of each other, and end. This needs no JAX.

PROGRAM = """
import os, signal, sys, time
from resnet_flax.devices import distributed, place
from resnet_flax.errors import UserError
address, count, index, timeout, peer_timeout, then = sys.argv[1:]
place = place.Place(address, int(count), int(index))
try:
    distributed.connect(place, float(timeout), float(peer_timeout))
    assert "jax" not in sys.modules
    print("met", flush=True)
    exec(then)
except UserError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    distributed.fail(str(error))
    sys.exit(1)
"""
FOREVER = "time.sleep(10**6)"


def connect(*places, timeout=processes.HANG, peer_timeout=processes.HANG, then=None):
    return processes.Processes(
        [
            *(sys.executable, "-c", PROGRAM, place.address, str(place.count), str(place.index)),
            *(str(timeout), str(peer_timeout), (then or {}).get(place.index, FOREVER)),
        ]
        for place in places
    )


def places(*indices, count):
    address = f"127.0.0.1:{processes.free_port()}"
    return [Place(address, count, i) for i in indices]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("os._exit(9)", "process {} ({}, pid {}) has gone; the same command, run again, goes on"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "process {} ({}, pid {}) has given no sign of li"),
        ("distributed.fail('oh dear', 9)", "process {} failed: oh dear"),
    ],
)
def test_the_end_of_one_process_is_the_end_of_all(index, then, message):
    timeout = 3 if "STOP" in then else processes.HANG
    three, then = places(0, 1, 2, count=3), {index: f"input(); {then}"}
    with connect(*three, peer_timeout=timeout, then=then) as running:
        assert [child.stdout.readline() for child in running.children] == ["met\n"] * 3
        child = running.children[index]
        child.stdin.write("\n")
        child.stdin.flush()
        ends = running.finish(*(i for i in range(3) if i != index))
        assert "STOP" in then[index] or child.wait() == 9
    for status, _, error in ends:
        assert status == 1
        assert error.startswith(f"error: {message.format(index, socket.gethostname(), child.pid)}")
        assert error.count("\n") == 1


@pytest.mark.slow
def test_processes_that_are_stopped_together_go_on():
    with connect(*places(0, 1, count=2), peer_timeout=2) as both:
        assert [child.stdout.readline() for child in both.children] == ["met\n"] * 2
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for child in both.children:
                child.send_signal(number)
            time.sleep(5)
        assert [child.poll() for child in both.children] == [None, None]


def test_one_process_that_finds_no_other_soon_gives_up():
    def refusal(place):
        with connect(place, timeout=0.1) as running:
            ((status, _, error),) = running.finish()
        assert status == 1
        return error

    (first,) = places(0, count=3)
    waited = f"waited 0.1 s (--connect_timeout) at {first.address} for process 1, 2 of 3"
    assert refusal(first) == f"error: {waited}, in vain\n"
    (second,) = places(1, count=2)
    reach = f"process 1 could not reach process 0 at {second.address} within 0.1 s (--conn"
    assert reach in refusal(second)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = refusal(Place(f"127.0.0.1:{port}", 2, 0))
    assert f"cannot listen at port {port}: Address already in use" in error


@pytest.mark.parametrize(
    ("count", "wrong", "message"),
    [
        (2, (4, 1), "--process_id=1 --num_processes=4, where HOST waits for process 1 of 2"),
        (3, (3, 1), "--process_id=1 --num_processes=3, where HOST waits for process 2 of 3"),
    ],
)
def test_processes_that_disagree_are_refused(count, wrong, message):
    first, second = places(0, 1, count=count)
    third = Place(first.address, *wrong)
    together = (first, third) if count == 2 else (first, second, third)
    with connect(*together) as running:
        ends = running.finish()
        host = f"{socket.gethostname()}, pid {running.children[0].pid} (--process_id=0)"
    for status, _, error in ends:
        assert status == 1
        assert message.replace("HOST", host) in error


def test_strangers_at_the_port_are_passed_over():
    first, second = places(0, 1, count=2)
    port = int(first.address.rpartition(":")[2])
    with connect(first) as running:
        for content in (b"GET / HTTP/1.0\r\n\r\n", b"", b"[]\n", b'{"index": 1}\n', b"\xff\n"):
            while True:
                try:
                    stranger = socket.create_connection(("127.0.0.1", port), timeout=60)
                    break
                except ConnectionRefusedError:
                    assert running.children[0].poll() is None
            with stranger:
                stranger.sendall(content)
        with connect(second, then={1: "distributed.fail('done')"}) as other:
            assert other.finish()[0][1] == "met\n"
            assert running.finish()[0][1:] == ("met\n", "error: process 1 failed: done\n")


VALUES = """
import os, sys
import jax, numpy as np
from jax.experimental import multihost_utils
from resnet_flax.devices import distributed
from resnet_flax.devices.place import Place
distributed.initialize(Place(*eval(sys.argv[1])), connect_timeout=600, peer_timeout=600)
weights = np.arange(2**20, dtype=np.float32)
def share():
    assert distributed.is_first()
    return {"w": weights, "list": [1, None, "x", {"b": True}]}
shared = distributed.share(share)
np.testing.assert_array_equal(shared["w"], weights)
assert list(shared["list"]) == [1, None, "x", {"b": True}]
assert distributed.gather(f"from {distributed.index()}") == ["from 0", "from 1"]
assert distributed.count() == 2
multihost_utils.process_allgather(weights)
if not distributed.is_first():
    os._exit(9)
try:
    while True:
        multihost_utils.process_allgather(weights)
except Exception:
    distributed.await_verdict()
"""


def test_values_reach_every_process_until_one_dies():
    """The second process, in the midst of a collective: JAX says nothing of its own."""
    commands = [[sys.executable, "-c", VALUES, repr(tuple(p))] for p in places(0, 1, count=2)]
    with processes.Processes(commands) as running:
        (status, _, error), other = running.finish()
    assert (status, other[0]) == (1, 9)
    assert re.fullmatch(r"error: process 1 \(.*\) has gone; the same command.*\n", error)


CLUSTERS = "SLURM_ KUBERNETES_ OMPI_ TPU_ JAX_COORDINATOR JAX_NUM_PROCESSES JAX_PROCESS_ID".split()


@pytest.fixture
def no_cluster(monkeypatch):
    for name in [n for n in os.environ if n.startswith(tuple(CLUSTERS))]:
        monkeypatch.delenv(name)


def test_a_place_is_given_or_asked_of_the_cluster(no_cluster, monkeypatch):
    for address in ("10.0.0.1:99", "[fe80::1]:99"):
        assert find_place(address, 4, 3) == Place(address, 4, 3)
    slurm = {"JOB_ID": 4096, "STEP_NODELIST": "node[007-009]", "NTASKS": 3, "PROCID": 2}
    for name, value in {**slurm, "LOCALID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    place = find_place(None, None, None)
    assert place[1:] == (3, 2, [0])
    assert place.address.startswith("node007:")
    # What is given stands before what the cluster says.
    assert find_place("other:5", None, None).address == "other:5"
    monkeypatch.setenv("SLURM_PROCID", "x")
    with pytest.raises(UserError, match="the cluster does not tell its processes: invalid literal"):
        find_place(None, None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None,) * 3, "--coordinator, --num_processes, --process_id is not given, and this is no"),
        (("h:1", 2, None), "--process_id is not given"),
        *(((a, 2, 0), f"--coordinator={a} must be HOST") for a in ("h", "h:0", "h:x", "h:65536")),
        (("h:1", 2, 2), "--process_id=2 must be in 0 to --num_processes=2 minus 1"),
        (("h:1", 2, -1), "--process_id=-1 must be in 0"),
        (("h:1", 0, 0), "--num_processes=0"),
    ],
)
def test_a_place_that_makes_no_sense(no_cluster, given, message):
    with pytest.raises(UserError, match=message):
        find_place(*given)


def test_cores_are_shared_by_the_processes_of_a_machine():
    def on(machine, *cores):
        return {"machine": machine, "cores": list(cores)}

    assert cpu.cores_per_process([on("a", 0, 1, 2, 3)]) == 4
    assert cpu.cores_per_process([on("a", 0, 1, 2, 3)] * 2) == 2
    assert cpu.cores_per_process([on("a", 0, 1), on("a", 2, 3)]) == 2  # pinned
    assert cpu.cores_per_process([on("a", *range(8)), on("b", 0, 1, 2)]) == 3
    assert cpu.cores_per_process([on("a", 0)] * 3) == 1
    # So many devices each that all of them together divide the batch.
    choose = cpu.choose_devices
    assert [choose(96, 0, cores=8, processes=n) for n in (1, 2, 3)] == [6, 3, 2]
    assert choose(128, 32, cores=4, processes=2) == 2


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 16])
def test_every_topology_gives_the_same_curve(tmp_path, group):
    """Devices in one process, one device a process, and both; `bn_group_size` is of the batch."""
    curves = {}
    for count, devices in ((1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (4, 1)):
        directory = tmp_path / f"{count}x{devices}"
        settings = {"train.cpu_devices": devices, "model.bn_group_size": group}
        processes.run(directory, count, settings=settings)
        curves[count, devices] = processes.losses(directory)
        assert_same_curve(curves[1, 1], curves[count, devices])
    assert curves[1, 2] == curves[2, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((1, 8), (1, 2)), ((2, 1), (1, 1)), ((1, 1), (2, 1))]
)
def test_a_run_goes_on_with_other_processes_and_devices(undivided, tmp_path, before, after):
    (count, devices), directory = before, tmp_path / "run"
    settings = {"train.cpu_devices": devices}
    ends = processes.signal_at_step(directory, 6, 0, signal.SIGTERM, count, settings=settings)
    assert all(status == 0 for status, _, _ in ends)
    count, devices = after
    processes.run(directory, count, settings={"train.cpu_devices": devices})
    assert_same_curve(processes.losses(undivided), processes.losses(directory))


@pytest.mark.slow
def test_evaluation_on_two_processes(two):
    directory, *_ = two
    said = processes.run(directory, 2, mode="evaluate", settings=CPU)
    result = json.loads((directory / "result.json").read_text())
    evaluation = json.loads((directory / "evaluation.json").read_text())["test"]
    assert (evaluation["wrong"], evaluation["examples"]) == (result["test_wrong_last"], 359)
    assert f"({evaluation['wrong']} of 359 wrong)" in said
