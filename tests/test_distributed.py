"""Several real processes: the same numbers as one, one end for all, and nothing left hanging."""

import json
import os
import runpy
import shutil
import socket
import threading

import jax
import numpy as np
import pytest

from resnet_flax.devices import cpu
from resnet_flax.devices.distributed import Place, find_place, rollcall
from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint
from resnet_flax.training import train
from tests import conftest, processes

slow = pytest.mark.slow
CPU = {"train.cpu_devices": 1}


def assert_same_curve(a, b):
    """As near as float32 allows: the last bits of sums differ, and training amplifies that.

    Measured over 60 steps: 0.011 between any two of the topologies below.
    """
    assert len(a) == len(b) >= 50
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_allclose(a[:10], b[:10], rtol=3e-3)
    np.testing.assert_allclose(a, b, rtol=3e-2)


def assert_same_end(a, b):
    steps = [checkpoint.steps_in(d / "checkpoints")[-1] for d in (a, b)]
    trees = [checkpoint.read(d / "checkpoints" / str(steps[0]))[0] for d in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    assert processes.losses(a) == processes.losses(b)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """An uninterrupted run of one process on one device."""
    directory = tmp_path_factory.mktemp("one") / "run"
    config = runpy.run_path(conftest.ROOT / "configs" / "quickstart.py")["get_config"]()
    config.update_from_flattened_dict(processes.SETTINGS | CPU)
    train.train(config, directory)
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """An uninterrupted run of two processes, and what the first of them printed."""
    directory = tmp_path_factory.mktemp("two") / "run"
    return directory, processes.run(directory, 2, settings=CPU)


def test_two_processes_learn_what_one_learns(one, two):
    directory, said = two
    assert_same_curve(processes.losses(one), processes.losses(directory))
    results = [json.loads((d / "result.json").read_text()) for d in (one, directory)]
    # Every one of the 359 images exactly once, in batches of 100.
    assert [r["test_examples"] for r in results] == [359, 359]
    assert [np.sum(r["test_confusion_last"]) for r in results] == [359, 359]
    assert abs(results[0]["test_error_last"] - results[1]["test_error_last"]) < 0.05
    assert "resnet8 on digits" in said
    assert "2 device(s)" in results[1]["hardware"]
    assert results[1]["processes"] == 2


def test_only_the_first_process_writes(two):
    directory, _ = two
    for split in ("train", "test"):
        steps = [r["step"] for r in processes.records(directory, split)]
        assert steps == sorted(set(steps))
    assert len(json.loads((directory / "run.json").read_text())["starts"]) == 1
    assert {p.name for p in directory.iterdir()} >= {"curves.png", "weights.safetensors"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The same run, process 1 killed on the way: its directory, and what process 0 made of it."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    with processes.Processes(directory, 2, settings=CPU) as running:
        running.wait_for_step(15)
        running.signal(1, processes.KILL)
        (status, _, error), _ = running.finish()
    return directory, status, error


def test_a_killed_process_ends_the_other_with_its_name(killed):
    _, status, error = killed
    assert status == 1
    assert "error: process 1 (" in error
    assert "has gone" in error
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def stopped(killed, tmp_path_factory):
    """The killed run, gone on with until SIGTERM comes to process 1."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    shutil.copytree(killed[0], directory)
    with processes.Processes(directory, 2, settings=CPU) as running:
        running.wait_for_step(25)
        running.signal(1, processes.TERM)
        ends = running.finish()
    return directory, ends


def test_sigterm_to_one_process_stops_all_at_one_step_and_saves(stopped):
    directory, ends = stopped
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "Stopped by SIGTERM at step" in ends[0][1]
    steps = checkpoint.steps_in(directory / "checkpoints")
    assert f"at step {steps[-1]};" in ends[0][1]
    assert 25 <= steps[-1] < 60
    assert not (directory / "result.json").exists()


def test_killed_stopped_and_resumed_ends_as_if_never_interrupted(stopped, two, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(stopped[0], directory)
    processes.run(directory, 2, settings=CPU)
    assert_same_end(directory, two[0])


def test_an_error_of_the_first_process_is_told_by_all(two):
    directory, _ = two
    settings = CPU | {"optim.momentum": 0.8}
    with processes.Processes(directory, 2, settings=settings) as running:
        ends = running.finish()
    assert [status for status, _, _ in ends] == [1, 1]
    for _, _, error in ends:
        assert "belongs to a run of another config" in error
        assert "optim.momentum: 0.9 -> 0.8" in error
        assert "Traceback" not in error
    assert "process 0 failed: workdir" in ends[1][2]


# How they find each other: no JAX is needed for that.


def meet_all(places, timeout=5.0):
    """`rollcall.meet` on a thread each: what it returns, or the error."""
    results = [None] * len(places)

    def meet(i):
        try:
            results[i] = rollcall.meet(places[i], timeout)
        except UserError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=meet, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def close(results):
    for links in results:
        for link in links.values() if isinstance(links, dict) else ():
            link.close()


def places(count, indices):
    address = f"127.0.0.1:{processes.free_port()}"
    return [Place(address, count, i) for i in indices]


def test_processes_meet_in_any_order_and_whole_messages_pass():
    results = meet_all(places(3, [2, 0, 1]))
    assert [sorted(links) for links in results] == [[0], [1, 2], [0]]
    first, last = results[1][2], results[0][0]
    value = {"state": {"w": np.arange(300_000, dtype=np.float32)}, "list": [1, None, "x"]}
    sender = threading.Thread(target=first.send, kwargs={"value": value})
    sender.start()
    got = last.receive(timeout=10)["value"]
    sender.join()
    np.testing.assert_array_equal(got["state"]["w"], value["state"]["w"])
    assert got["list"] == [1, None, "x"]
    first.close()
    with pytest.raises(ConnectionError):
        last.receive(timeout=10)
    close(results)


def test_a_missing_process_is_named_after_the_stated_time():
    results = meet_all(places(3, [0, 2]), timeout=0.5)
    assert "waited 0.5 s" in results[0]
    assert "process 1 of 3" in results[0]
    assert results[1] == results[0]


def test_nobody_at_the_coordinator_s_address():
    (error,) = meet_all(places(2, [1]), timeout=0.5)
    assert "process 1 could not reach process 0 at 127.0.0.1:" in error
    assert "within 0.5 s" in error
    assert "refused" in error


def test_two_processes_of_one_number():
    results = meet_all(places(3, [0, 1, 1]))
    assert sum("two processes were started with --process_id=1" in str(r) for r in results) >= 2


def test_processes_that_count_differently():
    first, _ = places(2, [0, 1])
    results = meet_all([first, Place(first.address, 4, 1)])
    for error in results:
        assert "--num_processes=4, process 0 with --num_processes=2" in error


def test_strangers_at_the_port_are_passed_over():
    first, second = places(2, [0, 1])
    thread = threading.Thread(target=lambda: results.extend(meet_all([first])))
    results = []
    thread.start()
    for content in (b"GET / HTTP/1.0\r\n\r\n", b"", b"\0" * 7 + b"\x03\xc1\xc1\xc1"):
        for _ in range(100):
            try:
                stranger = socket.create_connection(("127.0.0.1", first.port), timeout=5)
                break
            except OSError:
                threading.Event().wait(0.02)
        stranger.sendall(content)
        stranger.close()
    links = meet_all([second])
    thread.join()
    assert sorted(results[0]) == [1]
    close([*results, *links])


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = Place(f"127.0.0.1:{other.getsockname()[1]}", 2, 0)
        (error,) = meet_all([place], timeout=0.3)
    assert f"cannot listen at port {place.port}" in error
    assert "choose another --coordinator port" in error


CLUSTERS = "SLURM_ KUBERNETES_ OMPI_ TPU_ JAX_COORDINATOR JAX_NUM_PROCESSES JAX_PROCESS_ID".split()


@pytest.fixture
def no_cluster(monkeypatch):
    for name in [n for n in os.environ if n.startswith(tuple(CLUSTERS))]:
        monkeypatch.delenv(name)


def test_a_place_is_given_or_asked_of_the_cluster(no_cluster, monkeypatch):
    assert find_place("10.0.0.1:99", 4, 3) == Place("10.0.0.1:99", 4, 3)
    assert find_place("[fe80::1]:99", 1, 0).host == "fe80::1"
    slurm = {
        "SLURM_JOB_ID": "4096",
        "SLURM_STEP_NODELIST": "node[007-009]",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    place = find_place(None, None, None)
    assert (place.host, place.count, place.index) == ("node007", 3, 2)
    # What is given stands before what the cluster says.
    assert find_place("other:5", None, None).address == "other:5"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), "--coordinator, --num_processes, --process_id is not given"),
        (("h:1", 2, None), "--process_id is not given"),
        (("h", 2, 0), "--coordinator=h must be HOST:PORT"),
        (("h:0", 2, 0), "must be HOST:PORT"),
        (("h:x", 2, 0), "must be HOST:PORT"),
        (("h:1", 2, 2), "--process_id=2 must lie in 0 to 1"),
        (("h:1", 2, -1), "--process_id=-1 must lie in 0 to 1"),
        (("h:1", 0, 0), "--num_processes=0 must be at least 1"),
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
    assert [choose(0, 96, 0, cores=8, processes=n) for n in (1, 2, 3)] == [6, 3, 2]
    assert choose(0, 128, 32, cores=4, processes=2) == 2
    assert choose(3, 128, 0, cores=1, processes=2) == 3


# Other topologies, and what else can go wrong: `pytest -m slow`.


@slow
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


@slow
@pytest.mark.parametrize(
    ("before", "after"), [((1, 8), (1, 2)), ((2, 1), (1, 1)), ((1, 1), (2, 1))]
)
def test_a_run_goes_on_with_other_processes_and_devices(one, tmp_path, before, after):
    directory = tmp_path / "run"
    count, devices = before
    settings = {"train.cpu_devices": devices}
    with processes.Processes(directory, count, settings=settings) as running:
        running.wait_for_step(25)
        running.signal(0, processes.TERM)
        assert all(status == 0 for status, _, _ in running.finish())
    count, devices = after
    processes.run(directory, count, settings={"train.cpu_devices": devices})
    assert_same_curve(processes.losses(one), processes.losses(directory))


@slow
def test_evaluation_on_two_processes(two):
    directory, _ = two
    said = processes.run(directory, 2, mode="evaluate", settings=CPU)
    result = json.loads((directory / "result.json").read_text())
    evaluation = json.loads((directory / "evaluation.json").read_text())["test"]
    assert (evaluation["wrong"], evaluation["examples"]) == (result["test_wrong_last"], 359)
    assert f"({evaluation['wrong']} of 359 wrong)" in said


@slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stands_still_is_given_up(tmp_path, index):
    with processes.Processes(tmp_path / "run", 2, "--peer_timeout=4", settings=CPU) as running:
        running.wait_for_step(5)
        running.signal(index, processes.STOP)
        other = running.children[1 - index]
        _, error = other.communicate(timeout=60)
        running.signal(index, processes.KILL)
    assert other.returncode == 1
    assert f"process {index} (" in error
    assert "has given no sign of life for 4 s" in error


@slow
def test_the_end_of_the_first_process_is_the_end_of_all(tmp_path):
    with processes.Processes(tmp_path / "run", 2, settings=CPU) as running:
        running.wait_for_step(5)
        running.signal(0, processes.KILL)
        _, (status, _, error) = running.finish()
    # JAX's own runtime notices too, and may be the quicker one to abort.
    assert status != 0
    assert "process 0 (" in error or "leader task" in error


@slow
def test_processes_with_different_settings_are_refused(tmp_path):
    each = {1: ["--config.optim.learning_rate=0.2"]}
    with processes.Processes(tmp_path / "run", 2, settings=CPU, each=each) as running:
        ends = running.finish()
    assert [status for status, _, _ in ends] == [1, 1]
    message = "process 1 was started with --config.optim.learning_rate=0.2, process 0 with 0.05"
    assert all(message in error for _, _, error in ends)
    assert not (tmp_path / "run" / "config.json").exists()
