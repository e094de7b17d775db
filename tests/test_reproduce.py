"""`tools.reproduce`: which runs there are, and that each is made once and to its end.

Most runs here are a small program in Python's place that leaves what a run leaves; one is real.
"""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from resnet_flax import models
from resnet_flax.config import flatten, override
from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.runs.directory import Directory
from resnet_flax.tools import reproduce
from resnet_flax.tools.experiments import Run, make_runs, plan, rows_of, scaled
from resnet_flax.tools.reproduce import Runner
from tests.conftest import ROOT
from tests.faults import harness
from tests.processes import until

PYTHON, WEIGHTS = sys.executable, ROOT / "resnet_flax/pretrained/plain20.safetensors"

# It takes the lock of its directories, notes its start, and does what the file "action" there says.
FAKE = f"""#!{PYTHON} -IS
import fcntl, json, os, pathlib, shutil, signal, sys, time
if sys.argv[1] == "-c":
    sys.exit(print(os.environ.get("FAKE_BACKEND", "cpu")))
flags = dict(arg.removeprefix("--").partition("=")[::2] for arg in sys.argv[3:])
place, seeds = pathlib.Path(flags["workdir"]), int(flags.get("config.train.num_seeds", 1))
names = [f"seed{{int(flags['config.seed']) + i}}" for i in range(seeds)] if seeds > 1 else [""]
places = [place / name for name in names if not (place / name / "weights.safetensors").exists()]
locks = [open(place / ".lock", "a") for place in places]
for place, lock in zip(places, locks):
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(place / "starts", "a") as file:
        file.write(f"{{seeds}} ")
    action = (place / "action").read_text() if (place / "action").exists() else ""
    if action == "fail":
        sys.exit("error: no such data\\nlook elsewhere")
    if action == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (place / "saved").touch() or sys.exit(0))
        (place / "ready").touch()
        while not (place / "go").exists():
            time.sleep(0.02)
for place in places:
    shutil.copy("{WEIGHTS}", place / "weights.safetensors")
    result = {{"steps": 640, "test_error_last": 0.25, "seconds": 9, "seeds_in_program": seeds}}
    (place / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def fake(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("fake") / "python"
    path.write_text(FAKE)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(reproduce, "_LOOK", 0.02)


def make(directory, rows=5, actions=(), seeds=1):
    """Runs of 640 steps, and what is to become of them."""
    runs = make_runs(rows_of("plain")[:rows], directory, seeds=seeds, scale=0.01, overrides={})
    for run, action in zip(runs, actions, strict=False):
        run.directory.mkdir(parents=True)
        (run.directory / "action").write_text(action)
    return runs


def finish_by_hand(run):
    run.directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(WEIGHTS, run.directory / "weights.safetensors")
    result = {"steps": 640, "test_error_last": 0.5, "seconds": 1.0}
    files.write_json(run.directory / "result.json", result)


def starts(runs):
    """How many seeds each start of each run was for."""
    paths = [run.directory / "starts" for run in runs]
    return [path.read_text().split() if path.exists() else [] for path in paths]


@contextlib.contextmanager
def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    yield
    thread.join(120)
    assert not thread.is_alive()


def test_the_experiments_are_the_papers(tmp_path):
    assert rows_of("table6") == ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
    rows = rows_of("all", with_1202=True)
    assert set(rows) - set(rows_of("all")) == {"resnet1202"}
    # Every ablation of Identity Mappings that there is a net for is part of an experiment.
    ablations = {n for n in models.ARCHITECTURES if n.startswith("resnet110_") and "keras" not in n}
    assert ablations <= set(rows)
    assert len(rows) == len(set(rows)) == 33
    for run in make_runs(rows, tmp_path, seeds=1, overrides={}):
        c, net, option = run.config, *run.row.removeprefix("modern-").partition("-")[::2]
        assert (c.model.name, c.data.name) == (net, "cifar10")
        assert c.train.total_steps == (78_125 if "modern" in run.row else 64_000)
        assert c.model.shortcut == (option if option in models.OPTIONS else "auto")
        assert c.model.gate_bias == (0 if option == "bias0" else -6)


def test_a_run_is_an_ordinary_command(tmp_path, monkeypatch, fake, capsys):
    monkeypatch.chdir(ROOT)
    flags = "--seeds=2", "--scale=0.01", "--data_dir=/data", "--config.data.split=45k/5k"
    reproduce.main(["options", f"--workdir={tmp_path}/x", "--dry_run", *flags])
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:14:2]] == [
        "resnet20/seed0", "resnet20-B/seed0", "resnet20-C/seed0", "resnet56/seed0",
        "resnet56-B/seed0", "resnet56-C/seed0", "resnet20/seed1",
    ]  # fmt: skip
    assert lines[15].strip() == (
        "python -m resnet_flax.main --config=configs/paper.py:resnet20 --config.model.shortcut=B "
        "--config.checkpoint.every_steps=50 --config.eval.every_steps=50 "
        "--config.log.every_steps=1 --config.optim.boundaries_steps=320,480 "
        "--config.train.total_steps=640 --config.data.data_dir=/data --config.data.split=45k/5k "
        f"--config.seed=1 --workdir={tmp_path}/x/resnet20-B/seed1"
    )
    assert total.startswith("12 runs, 0 done, 12 to do: time unknown until a run here is done with")
    assert not (tmp_path / "x").exists()
    # From elsewhere the path of the configuration is whole. A part of the runs:
    monkeypatch.chdir(tmp_path)
    reproduce.main(["modern", "--part=2/2", "--seeds=1", "--dry_run"])
    text = capsys.readouterr().out
    assert f" --config={ROOT}/configs/modern.py:resnet32 --config.seed=0 --workdir=runs/p" in text
    assert "2 runs, 0 done, 2 to do" in text


def test_a_scale_shortens_every_duration(tmp_path):
    (run,) = make_runs(["resnet110_preact"], tmp_path, seeds=1, overrides={})
    assert scaled(run.config, 1) == {}
    keys = [
        "checkpoint.every_steps", "eval.every_steps", "log.every_steps", "optim.boundaries_steps",
        "optim.warmup_steps", "train.total_steps",
    ]  # fmt: skip
    assert {*keys, "train.chunk_steps"} == {k for k in flatten(run.config) if k.endswith("_steps")}
    for scale, values in {
        0.5: ["500", "250", "50", "16000,24000", "200", "32000"],
        1e-3: ["16", "16", "1", "32,48", "1", "64"],
        1e-9: ["1", "1", "1", "1,2", "1", "1"],  # Boundaries still rise.
    }.items():
        assert scaled(run.config, scale) == dict(zip(keys, values, strict=True))
    # What is given stays.
    given = {"eval.every_steps": "7", "train.total_steps": "1e3"}
    (run,) = make_runs(["resnet20"], tmp_path, seeds=1, scale=0.01, overrides=given)
    assert (run.config.eval.every_steps, run.config.train.total_steps) == (7, 1000)
    assert run.config.optim.boundaries_steps == (320, 480)


REFUSED = {
    "": "arguments are required: experiment",
    "table7": "unknown experiment 'table7'; known: table6, plain",
    "plain --seed=3": "unrecognized argument --seed=3",
    "plain --seeds=0": "--seeds=0 must be at least 1",
    "plain --jobs=0": "--jobs=0 must be at least 1",
    "plain --seeds_per_run=0": "--seeds_per_run=0 must be at least 1",
    "plain --scale=nan": "--scale=nan must be above 0 and at most 1",
    "plain --scale=1.5": "--scale=1.5 must be above 0 and at most 1",
    "plain --part=5/4": "--part=5/4 must be like 1/4",
    "plain --config.optim.momentum 0.8": "unrecognized argument --config.optim.momentum",
    "plain --workdir=gs://a/b": "--workdir=gs://a/b must be a local directory",
    "plain --config.seed=3": "--config.seed is the experiment's own",
    "plain --config.train.num_seeds=2": "num_seeds is the experiment's own",
    "plain --config.train.total_epochs=2": "experiments count in steps; give train.total_steps",
    "plain --config.optim.lerning_rate=1": "did you mean --config.optim.learning_rate",
    "plain --config.optim.learning_rate=-1": "learning_rate=-1.0 must lie in",
    # Data are looked at before anything begins.
    "plain --data_dir=no/such/place": "place', which does not exist",
}


@pytest.mark.parametrize("args", REFUSED)
def test_what_is_refused(tmp_path, monkeypatch, fake, args):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=REFUSED[args]):
        reproduce.main(args.split())
    assert not list(tmp_path.iterdir())


def test_a_failed_run_does_not_stop_the_rest(tmp_path, fake, capsys):
    runs = make(tmp_path, 5, ["", "fail", "killed", "", ""])
    # Neither a result of another length nor a damaged one is a result.
    (runs[0].directory / "result.json").write_text('{"steps": 11, "test_error_last": 0.1}')
    (runs[3].directory / "result.json").write_text("{")
    other = flatten(runs[4].config) | {"optim.learning_rate": 0.5}
    files.write_json(runs[4].directory / "config.json", other)
    runner = Runner(runs)
    runner.run()
    names = [run.name for run in runs]
    assert list(runner.done) == [names[0], names[3]]
    assert runner.failed[names[1]] == "failed: exit status 1\nerror: no such data\nlook elsewhere"
    assert runner.failed[names[2]] == "failed: killed by SIGKILL"
    assert "optim.learning_rate: 0.5 -> 0.1" in runner.failed[names[4]]
    assert (runs[1].directory / "log.txt").read_text().startswith("$ python -m resnet_flax.main ")
    with pytest.raises(SystemExit, match="1"):
        reproduce.finish(runner, tmp_path)
    said = capsys.readouterr().err
    assert f"{names[0]}: begins\n{names[0]}: done, test error 25.00 %\n" in said
    assert f"{names[1]} failed: exit status 1\nerror: no such data" in said
    reproduce.main(["plain", f"--workdir={tmp_path}", "--seeds=1", "--scale=0.01", "--dry_run"])
    said = capsys.readouterr()
    assert f"{names[4]} cannot be made: workdir {tmp_path}" in said.err
    assert "5 runs, 2 done, 3 to do: about 00:" in said.out
    # Once more: what is done is left alone, what failed is tried again.
    Runner(runs, jobs=2).run()
    assert [len(own) for own in starts(runs)] == [1, 2, 2, 1, 0]


def test_several_runners_share_the_runs(tmp_path, fake):
    runs = make(tmp_path, 5)
    runners = [Runner(runs) for _ in range(3)]
    with in_thread(runners[1].run), in_thread(runners[2].run):
        runners[0].run()
    # Each is made once, and all know that it is done.
    assert starts(runs) == [["1"]] * 5
    assert all(len(runner.done) == 5 and not runner.failed for runner in runners)


def test_a_run_that_another_process_is_at_is_waited_for(tmp_path, fake, capsys):
    runs = make(tmp_path, 3, ["", "", "wait"])
    runner = Runner(runs)
    with contextlib.ExitStack() as main:
        # Somebody's own main is at two of them, and finishes one.
        for run in runs[:2]:
            main.enter_context(Directory.open(run.directory))
        with in_thread(runner.run):
            until((runs[2].directory / "ready").exists)
            (runs[2].directory / "go").touch()
            until(lambda: runs[2].name in runner.done)
            finish_by_hand(runs[0])
            until(lambda: runs[0].name in runner.done)
            main.close()
    # The other, killed perhaps, is taken over.
    assert list(runner.done) == [runs[2].name, runs[0].name, runs[1].name]
    assert starts(runs) == [[], ["1"], ["1"]]
    assert capsys.readouterr().err.count(f"{runs[1].name}: another process is at it") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on_and_all_stops(tmp_path, fake, number, capsys):
    runs, old = make(tmp_path, 3, ["wait"] * 3), signal.getsignal(number)

    def send():
        until(lambda: all((run.directory / "ready").exists() for run in runs[:2]))
        os.kill(os.getpid(), number)

    runner = Runner(runs, jobs=2)
    with in_thread(send):
        runner.run()
    assert runner.stop_signal == (signal.SIGTERM if number == signal.SIGHUP else number)
    # The program saves on SIGTERM alone.
    saved = [(run.directory / "saved").exists() for run in runs]
    assert saved == [number != signal.SIGINT] * 2 + [False]
    assert (runner.done, runner.failed, starts(runs)) == ({}, {}, [["1"], ["1"], []])
    assert signal.getsignal(number) == old
    with pytest.raises(SystemExit, match=str(128 + runner.stop_signal)):
        reproduce.finish(runner, tmp_path)
    assert "The same command goes on" in capsys.readouterr().out


def test_killed_its_run_goes_on_and_it_is_started_again(tmp_path, fake):
    runs = make(tmp_path, 2, ["wait"])
    driver = f"""if True:
        import pathlib, sys
        from tests.test_reproduce import Runner, make
        sys.executable = {sys.executable!r}
        Runner(make(pathlib.Path({str(tmp_path)!r}), 2)).run()
    """
    with subprocess.Popen([PYTHON, "-c", driver], cwd=ROOT) as process:
        until((runs[0].directory / "ready").exists)
        process.kill()
    runner = Runner(runs)
    with in_thread(runner.run):
        until((runs[1].directory / "result.json").exists)
        (runs[0].directory / "go").touch()
    assert list(runner.done) == [runs[1].name, runs[0].name]
    assert starts(runs) == [["1"], ["1"]]


def test_neighbouring_seeds_share_a_process(tmp_path, fake, capsys):
    runs = make(tmp_path, 1, ["", "", "", "", "wait"], seeds=7)
    finish_by_hand(runs[1])
    runner, other = Runner(runs, jobs=2, seeds_per_run=3), Runner(runs[3:4])
    with in_thread(runner.run):
        until((runs[4].directory / "ready").exists)
        with in_thread(other.run):
            # A process holds all of its seeds.
            until(lambda: "seed3: another process is at it" in capsys.readouterr().err)
            (runs[4].directory / "go").touch()
    # No hole is jumped over.
    assert starts(runs) == [["1"], [], ["3"], ["3"], ["3"], ["2"], ["2"]]
    assert (len(runner.done), len(other.done)) == (7, 1)
    log = (runs[3].directory / "log.txt").read_text()
    assert f" --config.train.num_seeds=3 --workdir={tmp_path}/plain20 " in log
    assert " --config.seed=2 --config.train.num_seeds=3 " in log
    assert f"  # output in {runs[2].directory}" in log


def test_without_locks_it_says_so(tmp_path, fake, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    runner = Runner(make(tmp_path, 1))
    runner.run()
    assert list(runner.done) == ["plain20/seed0"]
    assert "no locks: let one process at a time work here, or use --part" in capsys.readouterr().err


def test_the_time_left_goes_by_what_is_done(tmp_path):
    runs = make(tmp_path, 2, seeds=2)
    results = {runs[0].name: {"seconds": 7200.0, "seeds_in_program": 2}}
    record = {"step": 480, "split": "train", "error": 0, "examples": 1}
    with Directory.open(runs[2].directory):
        # A log that is being written.
        log = json.dumps(record) + '\n{"step": 481, "sp'
        (runs[2].directory / "metrics.jsonl").write_text(log)
        status, total = plan(runs, results, 2)
    assert status == {
        "plain20/seed0": "done",
        "plain20/seed1": "running, at step 480 of 640, about 15:00",
        # By the number of layers.
        "plain32/seed0": "640 steps to do, about 1:36:00",
        "plain32/seed1": "640 steps to do, about 1:36:00",
    }
    assert total == "4 runs, 1 done, 3 to do: about 1:43:30 with --jobs=2"


@pytest.mark.parametrize(("backend", "mps"), [("cpu", False), ("gpu", False), ("gpu", True)])
def test_a_gpu_is_shared(tmp_path, fake, monkeypatch, capsys, backend, mps):
    monkeypatch.setenv("FAKE_BACKEND", backend)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    if mps:
        (tmp_path / "control").touch()
    for more, jobs in (([], 4 if backend == "gpu" else 1), (["--jobs=2"], 2), (["--jobs=1"], 1)):
        reproduce.main(["plain", f"--workdir={tmp_path}/x", "--seeds=1", "--dry_run", *more])
        said = capsys.readouterr()
        assert said.out.endswith(f"with --jobs={jobs}\n")
        hint = backend == "gpu" and jobs > 1 and not mps
        assert ("nvidia-cuda-mps-control -d" in said.err) == hint


def test_a_real_run_goes_on(tmp_path, undisturbed, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = *harness.FLAGS, "--config.train.cpu_devices=2"
    config = runpy.run_path("configs/quickstart.py")["get_config"]()
    override(config, dict(flag.removeprefix("--config.").split("=") for flag in flags[1:]))
    run = Run("tiny", tmp_path / "tiny/seed0", config, flags)
    finished = undisturbed().directory
    shutil.copytree(finished, run.directory)
    (run.directory / "result.json").unlink()
    runner = Runner([run])
    runner.run()
    reproduce.finish(runner, tmp_path)
    said = capsys.readouterr()
    assert f"{run.name}: goes on; it had come to step 40\n" in said.err
    assert "All 1 runs are done" in said.out
    result = json.loads((finished / "result.json").read_text())
    assert runner.done[run.name]["test_error_last"] == result["test_error_last"]
    assert "resnet8 on digits" in (run.directory / "log.txt").read_text()
