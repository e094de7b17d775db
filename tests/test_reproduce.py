"""`tools.reproduce`: which runs, how they are shortened, and that each is made once and to its end.

Most runs here are small programs that leave what a run leaves; one test makes real ones.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from resnet_flax import models
from resnet_flax.config import flatten
from resnet_flax.errors import UserError
from resnet_flax.grid import experiments, locks, plan
from resnet_flax.grid.durations import scaled
from resnet_flax.grid.experiments import Run, runs_of
from resnet_flax.grid.runner import Runner
from resnet_flax.runs import files
from resnet_flax.tools import reproduce
from tests.conftest import ROOT, make_small_config

# What stands for a run: it takes its directory's lock, counts its starts, and does what it is told.
FAKE = """
import fcntl, json, os, pathlib, signal, sys, time
directory, steps, action = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
lock = open(directory / ".lock", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("error: another process is training in workdir")
with open(directory / "starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
if action == "fail":
    sys.exit("error: no such data\\nlook elsewhere")
if action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if action == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (directory / "saved").touch() or sys.exit(0))
    (directory / "ready").touch()
    while not (directory / "go").exists():
        time.sleep(0.02)
(directory / "weights.safetensors").touch()
result = {"steps": steps, "test_error_last": 0.25, "seconds": 10.0}
(directory / "result.json").write_text(json.dumps(result))
"""


class FakeJob(plan.Job):
    @property
    def command(self):
        return [sys.executable, "-c", FAKE, str(self.directory), str(self.steps), *self.flags]


def make_fakes(directory, actions):
    config = make_small_config()
    return [
        FakeJob(f"{name}/seed0", directory / name / "seed0", config, (action,))
        for name, action in actions.items()
    ]


def run_all(jobs, directory, parallel=1, say=str):
    runner = Runner(jobs, directory, parallel=parallel, say=say)
    runner.run()
    return runner


def starts(job):
    path = job.directory / "starts"
    return len(path.read_text().split()) if path.exists() else 0


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_the_experiments_are_the_papers():
    def names(experiment, **kwargs):
        return [run.name for run in runs_of(experiment, **kwargs)]

    assert names("table6") == ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
    assert names("table6", on_request=True)[-1] == "resnet1202"
    assert names("plain") == ["plain20", "plain32", "plain44", "plain56", "plain110"]
    assert "resnet1202" not in names("all")
    everything = runs_of("all", on_request=True)
    assert len(everything) == len({run.name for run in everything}) == 33
    for run in everything:
        config = plan.load_config(run.config, [*run.overrides])
        net = run.name.removeprefix("modern-").partition("-")[0]
        assert config.model.name == net
        assert config.data.name == "cifar10"
        assert config.train.total_steps == (78_125 if "modern" in run.name else 64_000)
        option = run.name.rpartition("-")[2]
        assert config.model.shortcut == (option if option in models.OPTIONS else "auto")
    bias = plan.load_config("identity_mappings.py:resnet110_shortcut_gating", ["model.gate_bias=0"])
    assert bias.model.gate_bias == 0
    # Every ablation of Identity Mappings that there is a net for is part of an experiment.
    ablations = {n for n in models.ARCHITECTURES if n.startswith("resnet110_") and "keras" not in n}
    assert ablations <= {run.name for run in everything}
    with pytest.raises(UserError, match=r"unknown experiment 'table7'; known: table6, plain"):
        runs_of("table7")


def test_a_job_is_an_ordinary_command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = plan.make_jobs(
        runs_of("options"),
        tmp_path,
        seeds=2,
        scale=0.01,
        overrides=("data.data_dir=/data", "data.split=45k/5k"),
    )
    assert [job.name for job in jobs[:7]] == [
        "resnet20/seed0", "resnet20-B/seed0", "resnet20-C/seed0", "resnet56/seed0",
        "resnet56-B/seed0", "resnet56-C/seed0", "resnet20/seed1",
    ]  # fmt: skip
    assert jobs[7].shown_command == (
        f"python -m resnet_flax.main --config=configs/resnet20.py --workdir={tmp_path}/resnet20-B/"
        "seed1 --config.model.shortcut=B --config.data.data_dir=/data "
        "--config.data.split=45k/5k --config.seed=1 --config.train.total_steps=640 "
        "--config.optim.boundaries_steps=320,480 --config.eval.every_steps=50 "
        "--config.checkpoint.every_steps=50 --config.log.every_steps=1"
    )
    c = jobs[7].config
    assert (c.seed, c.model.shortcut, c.data.split) == (1, "B", "45k/5k")
    assert c.optim.boundaries_steps == (320, 480)
    # From elsewhere the path of the configuration is whole.
    monkeypatch.chdir(tmp_path)
    assert plan.make_jobs(runs_of("plain"), tmp_path, seeds=1)[0].flags[0] == (
        f"--config={ROOT}/configs/plain20.py"
    )


def test_a_scale_shortens_every_duration():
    config = plan.load_config("identity_mappings.py:resnet110_preact", [])
    assert scaled(config, 1) == {}
    assert scaled(config, 0.5) == {
        "train.total_steps": 32_000, "optim.boundaries_steps": (16_000, 24_000),
        "optim.warmup_steps": 200, "eval.every_steps": 250, "checkpoint.every_steps": 500,
        "log.every_steps": 50,
    }  # fmt: skip
    assert scaled(config, 1e-3) == {
        "train.total_steps": 64, "optim.boundaries_steps": (32, 48), "optim.warmup_steps": 1,
        "eval.every_steps": 16, "checkpoint.every_steps": 16, "log.every_steps": 1,
    }  # fmt: skip
    # Everything at its least, and boundaries that still rise.
    least = scaled(config, 1e-9)
    assert least.pop("optim.boundaries_steps") == (1, 2)
    assert set(least.values()) == {1}
    # A warm-up that goes by the error has no length.
    assert "optim.warmup_steps" not in scaled(plan.load_config("resnet110.py", []), 0.5)
    # An evaluation a step is what somebody asked for.
    often = plan.load_config("resnet20.py", ["eval.every_steps=10"])
    assert scaled(often, 0.1)["eval.every_steps"] == 10
    durations = {k for k in flatten(config) if k.endswith("_steps") and k != "train.chunk_steps"}
    assert durations == set(scaled(config, 0.5))
    for bad in (0, -1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"--scale=.* must be above 0 and at most 1"):
            scaled(config, bad)
    epochs = plan.load_config("resnet20.py", ["train.total_epochs=10"])
    with pytest.raises(UserError, match=r"config.train.total_epochs=10.0 is none: give"):
        scaled(epochs, 0.5)


def test_what_is_given_is_not_scaled(tmp_path):
    given = ("eval.every_steps=7", "train.total_steps=1e3")
    (job,) = plan.make_jobs(runs_of("table6")[:1], tmp_path, seeds=1, scale=0.01, overrides=given)
    assert (job.config.eval.every_steps, job.config.train.total_steps) == (7, 1000)
    assert job.config.optim.boundaries_steps == (320, 480)
    assert sum("eval.every_steps" in flag for flag in job.flags) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "--config.seed is the experiment's own"),
        ("model.name=resnet8", "--config.model.name is the experiment's own"),
        ("optim.lerning_rate=1", "did you mean --config.optim.learning_rate"),
        ("optim.learning_rate", "write --config.optim.learning_rate=VALUE"),
        ("optim.learning_rate=fast", "--config.optim.learning_rate=fast must be a number"),
        ("optim.learning_rate=-1", "config.optim.learning_rate=-1.0 must lie in"),
    ],
)
def test_overrides_that_make_no_sense(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        plan.make_jobs(runs_of("plain"), tmp_path, seeds=1, overrides=(override,))


def test_all_runs_are_made_and_a_failed_one_does_not_stop_the_rest(tmp_path):
    jobs = make_fakes(tmp_path, {"a": "", "b": "fail", "c": "killed", "d": "", "e": ""})
    said = []
    # The directory of the last one belongs to another configuration.
    jobs[4].directory.mkdir(parents=True)
    other = flatten(make_small_config()) | {"optim.learning_rate": 0.5}
    files.write_json(jobs[4].directory / "config.json", other)
    runner = run_all(jobs, tmp_path, say=said.append)
    assert list(runner.done) == ["a/seed0", "d/seed0"]
    assert sorted(runner.failed) == ["b/seed0", "c/seed0", "e/seed0"]
    assert runner.failed["b/seed0"] == "exit status 1\nerror: no such data\nlook elsewhere"
    assert runner.failed["c/seed0"].startswith("killed by SIGKILL")
    assert "optim.learning_rate: 0.5 -> 0.1" in runner.failed["e/seed0"]
    assert [starts(job) for job in jobs] == [1, 1, 1, 1, 0]
    assert "a/seed0: done, test error 25.00 %" in said
    log = (jobs[1].directory / "log.txt").read_text()
    assert log.startswith("$ python -c ")
    # Once more: what is done is left alone, what failed is tried again.
    again = run_all(jobs, tmp_path)
    assert list(again.done) == ["a/seed0", "d/seed0"]
    assert [starts(job) for job in jobs] == [1, 2, 2, 1, 0]


def test_a_result_of_another_length_or_a_damaged_one_is_no_result(tmp_path):
    jobs = make_fakes(tmp_path, {"a": "", "b": "", "c": ""})
    for job, text in zip(jobs, ('{"steps": 11, "test_error_last": 0.1}', "{", None), strict=True):
        job.directory.mkdir(parents=True)
        (job.directory / "weights.safetensors").touch()
        if text:
            (job.directory / "result.json").write_text(text)
    runner = run_all(jobs, tmp_path, parallel=2)
    assert len(runner.done) == 3
    assert [starts(job) for job in jobs] == [1, 1, 1]


def test_several_runners_share_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_flax.grid.runner._LOOK_AT_OTHERS", 0.1)
    jobs = make_fakes(tmp_path, {name: "" for name in "abcdefgh"})
    runners = [Runner(jobs, tmp_path, parallel=1, say=str) for _ in range(3)]
    threads = [threading.Thread(target=runner.run) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # Each made once, and known to be done by all.
    assert [starts(job) for job in jobs] == [1] * 8
    for runner in runners:
        assert len(runner.done) == 8
        assert not runner.failed


def test_a_run_that_another_process_has_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_flax.grid.runner._LOOK_AT_OTHERS", 0.1)
    jobs = make_fakes(tmp_path, {"a": "", "b": ""})
    said = []
    jobs[0].directory.mkdir(parents=True)
    # As if by hand: somebody's own main.
    with files.claim(jobs[0].directory):
        runner = Runner(jobs, tmp_path, parallel=1, say=said.append)
        thread = threading.Thread(target=runner.run)
        thread.start()
        wait_for(jobs[1].directory / "result.json")
        assert thread.is_alive()
        assert starts(jobs[0]) == 0
    # It ends, killed perhaps, without a result: the run is taken over.
    thread.join(60)
    assert list(runner.done) == ["b/seed0", "a/seed0"]
    assert said.count("a/seed0: another process is at it") == 1


def test_what_others_have_finished_is_noticed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_flax.grid.runner._LOOK_AT_OTHERS", 0.1)
    jobs = make_fakes(tmp_path, {"a": "", "b": "wait"})
    jobs[0].directory.mkdir(parents=True)
    with files.claim(jobs[0].directory):
        runner = Runner(jobs, tmp_path, parallel=1, say=str)
        thread = threading.Thread(target=runner.run)
        thread.start()
        wait_for(jobs[1].directory / "ready")
        (jobs[0].directory / "weights.safetensors").touch()
        result = {"steps": 12, "test_error_last": 0.5}
        files.write_json(jobs[0].directory / "result.json", result)
        end = time.monotonic() + 60
        while "a/seed0" not in runner.done and time.monotonic() < end:
            time.sleep(0.02)
        # While the other is still at work.
        assert list(runner.done) == ["a/seed0"]
        (jobs[1].directory / "go").touch()
        thread.join(60)
    assert [starts(job) for job in jobs] == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on_and_all_stops(tmp_path, number):
    jobs = make_fakes(tmp_path, {"a": "wait", "b": "wait", "c": "wait"})
    old = signal.getsignal(number)

    def send():
        for job in jobs[:2]:
            wait_for(job.directory / "ready")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    runner = run_all(jobs, tmp_path, parallel=2)
    thread.join()
    assert runner.stop_signal == (signal.SIGTERM if number == signal.SIGHUP else number)
    assert not runner.done
    assert not runner.failed
    # The fakes save on SIGTERM, as runs do; Python's own answer to SIGINT ends them too.
    saved = [(job.directory / "saved").exists() for job in jobs]
    assert saved == [number != signal.SIGINT] * 2 + [False]
    assert [starts(job) for job in jobs] == [1, 1, 0]
    assert signal.getsignal(number) == old
    with pytest.raises(SystemExit) as exit_status:
        reproduce.finish(runner, tmp_path)
    assert exit_status.value.code == 128 + runner.stop_signal


def test_killed_at_once_its_runs_go_on_and_it_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_flax.grid.runner._LOOK_AT_OTHERS", 0.1)
    (tmp_path / "drive.py").write_text(
        "import pathlib, sys\n"
        "from tests.test_reproduce import make_fakes, run_all\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "run_all(make_fakes(path, {'a': 'wait', 'b': ''}), path)\n"
    )
    command = [sys.executable, tmp_path / "drive.py", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    jobs = make_fakes(tmp_path, {"a": "wait", "b": ""})
    wait_for(jobs[0].directory / "ready")
    process.kill()
    process.wait()
    runner = Runner(jobs, tmp_path, parallel=1, say=str)
    thread = threading.Thread(target=runner.run)
    thread.start()
    wait_for(jobs[1].directory / "result.json")
    (jobs[0].directory / "go").touch()
    thread.join(60)
    assert sorted(runner.done) == ["a/seed0", "b/seed0"]
    assert [starts(job) for job in jobs] == [1, 1]


def test_locks(tmp_path):
    assert locks.are_supported(tmp_path / "new")
    assert not locks.is_held(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    with locks.hold(tmp_path / "folder" / "lock"):
        assert locks.hold(tmp_path / "folder" / "lock") is None
        assert locks.is_held(tmp_path / "folder" / "lock")
    assert not locks.is_held(tmp_path / "folder" / "lock")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        locks.hold(tmp_path / "file" / "lock")


def test_without_locks_it_says_so(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    said = []
    runner = run_all(make_fakes(tmp_path, {"a": ""}), tmp_path, say=said.append)
    assert list(runner.done) == ["a/seed0"]
    assert "has no locks" in said[0]
    assert "--part" in said[0]


def test_the_time_left_goes_by_what_is_done(tmp_path):
    jobs = plan.make_jobs(
        (*runs_of("table6")[:2], Run("resnet20-B", "resnet20.py", ("model.shortcut=B",))),
        tmp_path,
        seeds=2,
    )
    text = reproduce.plan(jobs, 1)
    assert "resnet20/seed0: 64000 steps to do, time unknown" in text
    assert text.endswith(
        "6 runs, 0 done, 6 to do: time unknown until a run here is done with --jobs=1"
    )
    done, same, deeper = jobs[0], jobs[3], jobs[1]
    assert (done.name, same.name) == ("resnet20/seed0", "resnet20/seed1")
    done.directory.mkdir(parents=True)
    (done.directory / "weights.safetensors").touch()
    result = {"steps": 64_000, "test_error_last": 0.1, "seconds": 3600.0}
    files.write_json(done.directory / "result.json", result)
    finished = [(done, result)]
    assert plan.estimate(same, plan.State(0, 64_000), finished) == 3600
    assert plan.estimate(same, plan.State(48_000, 64_000), finished) == 900
    # By multiply-adds: 68,862,592 against 40,551,040.
    other = plan.estimate(deeper, plan.State(0, 64_000), finished)
    assert other == pytest.approx(3600 * 68_862_592 / 40_551_040)
    assert plan.estimate(same, plan.State(0, 64_000), []) is None
    text = reproduce.plan(jobs, 2)
    assert "resnet20/seed0: done" in text
    assert "resnet20/seed1: 64000 steps to do, about 1:00:00" in text
    assert "6 runs, 1 done, 5 to do: about" in text


def test_the_last_step_is_read_from_a_log_being_written(tmp_path):
    assert plan.last_step(tmp_path) == 0
    lines = [json.dumps({"step": s, "split": "train", "x": "y" * 90}) for s in range(1, 300)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30')
    assert plan.last_step(tmp_path) == 299
    (tmp_path / "metrics.jsonl").write_bytes(b"\x00\xff\n[1]\n")
    assert plan.last_step(tmp_path) == 0


def tool(*args):
    command = [sys.executable, "-m", "resnet_flax.tools.reproduce", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line(tmp_path):
    done = tool("plain", "--seeds=1", f"--workdir={tmp_path}/x", "--dry_run", "--part=2/2",
                "--data_dir=/d", "--config.data.split=45k/5k")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("2 runs, 0 done, 2 to do")
    assert "--config.data.split=45k/5k --config.data.data_dir=/d --config.seed=0" in done.stdout
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "arguments are required: experiment"),
        (["table7"], "unknown experiment 'table7'"),
        (["plain", "--seed=3"], "unrecognized argument --seed=3"),
        (["plain", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["plain", "--jobs=0"], "--jobs=0 must be at least 1"),
        (["plain", "--part=5/4"], "--part=5/4 must be like 1/4"),
        (["plain", "--config.optim.momentum", "0.8"], "unrecognized argument --config.optim.mom"),
        (["plain", "--workdir=gs://a/b"], "--workdir=gs://a/b must be a local directory"),
        (["plain", "--config.KEY=1"], "stands for a key"),
    ],
)
def test_wrong_flags(args, message):
    with pytest.raises(UserError, match=message):
        reproduce.main(args)


def test_without_data_it_is_said_once_and_nothing_begins(tmp_path):
    args = ["plain", "--seeds=2", f"--workdir={tmp_path}/x", f"--data_dir={tmp_path}/absent"]
    with pytest.raises(UserError, match="absent', which does not exist"):
        reproduce.main(args)
    assert not (tmp_path / "x").exists()


def test_two_real_runs(tmp_path, capsys):
    small = (
        "model.name=resnet8", "data.batch_size=32", "train.cpu_devices=1", "eval.every_steps=5",
        "checkpoint.every_steps=5", "train.total_steps=1000", "log.tensorboard=False",
    )  # fmt: skip
    runs = (Run("tiny", "quickstart.py", small),)
    jobs = plan.make_jobs(runs, tmp_path, seeds=2, scale=0.01)
    runner = reproduce.reproduce(jobs, tmp_path, parallel=1)
    reproduce.finish(runner, tmp_path)
    assert "All 2 runs are done" in capsys.readouterr().out
    errors = set()
    for seed in (0, 1):
        directory = tmp_path / "tiny" / f"seed{seed}"
        result = json.loads((directory / "result.json").read_text())
        assert (result["steps"], result["seed"]) == (10, seed)
        assert runner.done[f"tiny/seed{seed}"] == result
        assert "resnet8 on digits" in (directory / "log.txt").read_text()
        errors.add(result["test_loss_last"])
    assert len(errors) == 2
    # As the same program sees it that comes after: nothing to do.
    before = (tmp_path / "tiny" / "seed0" / "result.json").stat().st_mtime_ns
    assert len(reproduce.reproduce(jobs, tmp_path, parallel=1).done) == 2
    assert (tmp_path / "tiny" / "seed0" / "result.json").stat().st_mtime_ns == before


def test_experiments_name_files_that_are_there():
    for run in runs_of(experiments.ALL, on_request=True):
        assert pathlib.Path(ROOT, "configs", run.config.partition(":")[0]).is_file()
