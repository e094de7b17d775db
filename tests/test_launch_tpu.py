"""launch/tpu_vm.sh against a recording stand-in for gcloud, which runs what workers are sent."""

import contextlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# What a worker has for Python: notes how it was called, trains by counting.
PYTHON = r"""#!{python} -IS
import json, os, pathlib, signal, sys, time
world = pathlib.Path(os.environ["WORLD"])
words = sys.argv[1:]
if words[:2] == ["-m", "venv"]:
    target = pathlib.Path(words[-1]) / "bin"
    target.mkdir(parents=True)
    (target / "python").write_text(pathlib.Path(__file__).read_text())
    (target / "python").chmod(0o755)
elif words[:2] == ["-m", "resnet_flax.main"]:
    workdir = pathlib.Path(next(w for w in words if w.startswith("--workdir="))[10:])
    workdir.mkdir(parents=True, exist_ok=True)
    step = workdir / "step"
    first = int(step.read_text()) if step.exists() else 0
    with open(world / "runs.jsonl", "a") as log:
        log.write(json.dumps([os.environ["HOME"][-1], first, words[2:]]) + "\n")
    (workdir / "config.json").write_text("{{}}")
    (workdir / "1.orbax-checkpoint-tmp").mkdir(exist_ok=True)
    (workdir / "1.orbax-checkpoint-tmp" / "part").write_text("")
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    print("training", flush=True)
    while not stop and not (world / "finish").exists():
        first += 1
        (workdir / "new").write_text(str(first))
        (workdir / "new").replace(step)
        time.sleep(0.02)
    sys.exit(0 if stop else int((world / "finish").read_text() or 0))
"""
FLAGS = ["--config=configs/resnet20.py", """--config.data.archive=it's "odd" $HOME; `x` \\ é"""]


class World:
    def __init__(self, path):
        self.path, self.begun = path, None
        bin = path / "bin"
        bin.mkdir()
        gcloud = f'#!/bin/sh\nexec {sys.executable} -IS {ROOT}/tests/fake_gcloud.py "$@"\n'
        python = PYTHON.format(python=sys.executable)
        for name, text in {"gcloud": gcloud, "python3.13": python}.items():
            (bin / name).write_text(text)
            (bin / name).chmod((bin / name).stat().st_mode | stat.S_IEXEC)
        self.env = {"PATH": f"{bin}:/usr/bin:/bin", "HOME": str(path), "WORLD": str(path)}

    def command(self, command, *options):
        given = ["--name=vm", "--zone=z", "--poll=0.1", "--save_every=0.1", *options]
        return ["bash", f"{ROOT}/launch/tpu_vm.sh", command, *given]

    def run(self, command, *options, **kwargs):
        return subprocess.run(
            self.command(command, *options),
            env=self.env | kwargs.pop("env", {}),
            capture_output=True,
            text=True,
            cwd=self.path,
            timeout=180,
            **kwargs,
        )

    def begin(self, command, *options):
        self.begun = subprocess.Popen(
            self.command(command, *options),
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.path,
            start_new_session=True,
        )
        return self.begun

    def calls(self):
        file = self.path / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def verbs(self):
        return [verb for call in self.calls() for verb in call[3:4] if verb in ("create", "delete")]

    def starts(self):
        file = self.path / "runs.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def read(self, path):
        return (self.path / path).read_text() if (self.path / path).exists() else ""

    def set_state(self, *states, kind="tpu-vm"):
        (self.path / kind).write_text("\n".join(states))

    def end(self):
        if self.begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.begun.pid, signal.SIGKILL)
            self.begun.wait()
            self.begun.stderr.close()
        self.end_processes()

    def end_processes(self):
        for home in (self.path / "workers").glob("*"):
            for file in home.glob("runs/.vm.*"):
                if file.suffix in (".pid", ".keeper"):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(int(file.read_text().split()[0]), signal.SIGKILL)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.end()


def until(condition, what):
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def test_without_a_project_it_does_not_begin(world):
    done = world.run("watch", "--", *FLAGS, env={"PROJECT": ""})
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Google Cloud project: give --project=PROJECT")
    assert done.stderr.count("\n") == 1


def test_a_preempted_run_goes_on_from_the_bucket(world):
    bucket = "bucket/b/p/vm"
    watch = world.begin("watch", "--spot", "--bucket=gs://b/p", "--", *FLAGS)
    until(lambda: int(world.read(f"{bucket}/step") or 0) > 5, "a saved step")
    assert world.verbs() == ["create"]
    # The disk goes with the machine.
    world.end_processes()
    for home in (world.path / "workers").glob("*"):
        home.rename(world.path / f"gone{home.name}")
    saved = int(world.read(f"{bucket}/step"))
    world.set_state("PREEMPTED")
    until(lambda: len(world.starts()) == 4, "the second start")
    (world.path / "finish").write_text("0")
    _, errors = watch.communicate(timeout=180)
    assert watch.returncode == 0, errors
    assert "vm is PREEMPTED" in errors
    assert world.verbs() == ["create", "delete", "create"]
    for worker, first, words in world.starts():
        home = world.path / "workers" / worker
        assert words == ["--distributed", f"--workdir={home}/runs/vm", *FLAGS]
        assert first in (0, saved)
    assert [first for _, first, _ in world.starts()] == [0, 0, saved, saved]
    assert not list((world.path / bucket).glob("*orbax-checkpoint-tmp*"))
    until(lambda: world.read(f"{bucket}/step") == world.read("workers/0/runs/vm/step"), "last copy")

    assert world.run("fetch", "--bucket=gs://b/p").returncode == 0
    assert world.read("runs/vm/step") == world.read(f"{bucket}/step")
    assert world.run("delete", "--bucket=gs://b/p").returncode == 0
    gone = world.run("delete", "--bucket=gs://b/p")
    assert gone.returncode == 0
    assert "there is no vm" in gone.stderr


def test_every_step_may_be_given_again(world):
    for _ in range(2):
        for step in ("create", "install"):
            done = world.run(step)
            assert done.returncode == 0, done.stderr
    assert "installed already" in done.stdout
    assert world.verbs() == ["create"]
    for said in ("vm started", "vm is running already"):
        done = world.run("start", "--", *FLAGS)
        assert done.stdout.count(said) == 2, done.stdout + done.stderr
    until(lambda: len(world.starts()) == 2, "both workers")
    assert world.run("status").stdout.split() == ["READY", "running", "running"]
    until(lambda: "training" in world.read("workers/0/runs/.vm.log"), "the log")
    for _ in range(2):
        assert world.run("stop").returncode == 0
    # Told to stop: not the end of the run, whatever the program's own status.
    assert world.run("status").stdout.split() == ["READY", "ended", "143", "ended", "143"]
    assert "training" in world.run("follow").stdout
    assert world.run("fetch").returncode == 0
    assert world.read("runs/vm/step") == world.read("workers/0/runs/vm/step")
    assert len(world.starts()) == 2


def test_a_run_that_fails_is_not_started_again(world):
    (world.path / "finish").write_text("3")
    done = world.run("watch", "--", *FLAGS)
    assert done.returncode == 1
    assert "vm has failed" in done.stderr
    assert "2 ended 3" in done.stderr
    assert len(world.starts()) == 2


@pytest.mark.parametrize("command", ["create", "watch"])
def test_no_quota(world, command):
    (world.path / "refusal").write_text(
        "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'X' exceeded."
    )
    done = world.run(command, "--type=v5p-8", *(["--", "x"] if command == "watch" else []))
    assert done.returncode == 1
    assert "Quota limit 'X' exceeded" in done.stderr
    assert "error: " in done.stderr
    assert "v5p-8 in z" in done.stderr
    assert world.verbs() == ["create"]


def test_watch_asks_again_where_there_is_no_capacity(world):
    (world.path / "refusal").write_text("ERROR: There is no more capacity in the zone")
    watch = world.begin("watch", "--", "x")
    until(lambda: len(world.verbs()) > 1, "a second attempt")
    assert watch.poll() is None


def test_queued_resources(world):
    (world.path / "after_queued-resources").write_text(
        "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE"
    )
    done = world.run("create", "--queued", "--spot", "--type=v5litepod-16", "--project=p")
    assert done.returncode == 0, done.stderr
    create = next(call for call in world.calls() if "create" in call)
    assert create == [
        *"compute tpus queued-resources create vm --node-id=vm".split(),
        "--runtime-version=v2-alpha-tpuv5-lite",
        *"--accelerator-type=v5litepod-16 --spot --zone=z --project=p --quiet".split(),
    ]
    assert "vm is WAITING_FOR_RESOURCES" in done.stderr
    # Preempted: the queued resource is suspended, and must go before its name is free again.
    world.set_state("SUSPENDED", kind="queued-resources")
    assert world.run("create", "--queued").returncode == 0
    assert world.verbs() == ["create", "delete", "create"]
    delete = next(call for call in world.calls() if "delete" in call)
    assert "--force" in delete


def test_what_is_lost_at_once_is_an_error(world):
    (world.path / "after_queued-resources").write_text("ACCEPTED\nFAILED")
    done = world.run("create", "--queued")
    assert done.returncode == 1
    assert "vm is FAILED" in done.stderr
    assert "error: gcloud could not make vm" in done.stderr
    assert world.verbs() == ["create"]


def test_a_question_without_an_answer_is_not_taken_for_absence(world):
    world.set_state("?")
    done = world.run("create")
    assert done.returncode == 1
    assert "Reauthentication failed" in done.stderr
    assert world.verbs() == []


@pytest.mark.parametrize(
    "command",
    ["create", "install", "start", "follow", "status", "watch", "stop", "fetch", "delete"],
)
def test_dry_run_does_nothing(world, command):
    flags = ["--", *FLAGS] if command in ("start", "watch") else []
    done = world.run(command, "--dry_run", "--bucket=gs://b", *flags)
    assert done.returncode == 0, done.stderr
    assert "+ gcloud " in done.stdout
    assert world.calls() == []
    assert sorted(p.name for p in world.path.iterdir()) == ["bin"]
    if flags:
        # Through two shells, the flags arrive as they were given.
        said = [
            subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True).stdout
            for line in done.stdout.splitlines()
            if "worker.sh" in line
        ]
        sent = [word for line in said for word in line.decode().split("\0") if "'start'" in word]
        assert [shlex.split(word)[-2:] for word in sent] == [FLAGS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["create", "--zone=z"], "--name=NAME is missing"),
        (["create", "--name=n"], "--zone=ZONE is missing"),
        (["create", "--name=n", "--zone=z", "--tpye=x"], "unknown option '--tpye=x'"),
        (["create", "--name=n", "--zone=z", "--bucket=b"], "--bucket='b' must begin with gs://"),
        (["start", "--name=n", "--zone=z"], "no flags of the training program"),
        (["start", "--name=n", "--zone=z", "--", "--workdir=x"], "--workdir=x is set by this"),
        (["start", "--name=n", "--zone=z", "--run=a b", "--", "x"], "--run='a b' must be of"),
        (["create", "--name=n", "--zone=z"], "gcloud is not on PATH"),
    ],
)
def test_wrong_use(tmp_path, options, message):
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "sed"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    done = subprocess.run(
        ["/bin/bash", f"{ROOT}/launch/tpu_vm.sh", *options],
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_workers_commands_by_hand(tmp_path):
    def worker(*words):
        return subprocess.run(
            ["bash", f"{ROOT}/launch/worker.sh", *words],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )

    done = worker("--dry_run", "start", "r", "--", "--config=a b")
    assert f"--distributed --workdir={tmp_path}/runs/r --config=a\\ b" in done.stdout
    for command in ("save", "restore", "keep"):
        assert "+ gcloud storage rsync" in worker("--dry_run", command, "r", "gs://b").stdout
    assert worker("status", "r").stdout == "absent\n"
    assert list(tmp_path.iterdir()) == []
    for words, status, message in [
        ((), 2, "worker.sh COMMAND"),
        (("start", "a b", "--"), 1, "no name of a run: 'a b'"),
        (("save", "r", "/tmp"), 1, "no bucket, gs://...: '/tmp'"),
        (("start", "r", "--config=x"), 1, "worker.sh start RUN -- FLAGS"),
        (("follow", "r"), 1, "r has not been started here"),
    ]:
        done = worker(*words)
        assert done.returncode == status
        assert message in done.stderr
