"""launch/tpu_vm.sh against a recording stand-in for gcloud, which runs what workers are sent."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.processes import HANG, until

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
    (workdir / "config.json").write_text("{}")
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
    """A directory with everything that the scripts see: tools, workers' homes, bucket, states."""

    def __init__(self, path):
        self.path = path
        gcloud = f'#!/bin/sh\nexec {sys.executable} -IS {ROOT}/tests/fake_gcloud.py "$@"\n'
        # Of a checkout what the scripts need, not all that they would send.
        self.script = path / "checkout/launch/tpu_vm.sh"
        shutil.copytree(ROOT / "launch", self.script.parent)
        for name in ("bin", *(f"checkout/{n}" for n in (".git", "configs", "resnet_flax"))):
            (path / name).mkdir()
        for name in ("pyproject.toml", "README.md"):
            (path / "checkout" / name).touch()
        for name, text in {"gcloud": gcloud, "python3.13": PYTHON}.items():
            (path / "bin" / name).write_text(text.replace("{python}", sys.executable))
            (path / "bin" / name).chmod(0o755)
        self.env = {"PATH": f"{path}/bin:/usr/bin:/bin", "HOME": str(path), "WORLD": str(path)}

    def begin(self, command, *options, env=(), **kwargs):
        given = ["--name=vm", "--zone=z", "--poll=0.1", "--save_every=0.1", *options]
        return subprocess.Popen(
            ["bash", self.script, command, *given],
            env=self.env | dict(env),
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.path,
            start_new_session=True,
            **kwargs,
        )

    def run(self, command, *options, env=()):
        """(exit status, stdout, stderr) of tpu_vm.sh."""
        process = self.begin(command, *options, env=env, stdout=subprocess.PIPE)
        out, error = process.communicate(timeout=HANG)
        return process.returncode, out, error

    @contextlib.contextmanager
    def watching(self, *options):
        process = self.begin("watch", *options)
        with process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def lines(self, name):
        return [json.loads(line) for line in self.read(name).splitlines()]

    def verbs(self):
        calls = [call[3] for call in self.lines("calls.jsonl") if len(call) > 3]
        return [verb for verb in calls if verb in ("create", "delete")]

    def starts(self):
        return self.lines("runs.jsonl")

    def read(self, path):
        return (self.path / path).read_text() if (self.path / path).exists() else ""

    def write(self, name, *lines):
        (self.path / name).write_text("\n".join(lines))

    def end_processes(self):
        for file in self.path.glob("workers/*/runs/.vm.*"):
            if file.suffix in (".pid", ".keeper"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(file.read_text().split()[0]), signal.SIGKILL)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.end_processes()


def test_a_preempted_run_goes_on_from_the_bucket(world):
    bucket = "bucket/b/p/vm"
    with world.watching("--spot", "--bucket=gs://b/p", "--", *FLAGS) as watch:
        until(lambda: len(world.starts()) == 2 and int(world.read(f"{bucket}/step") or 0) > 5)
        assert world.verbs() == ["create"]
        # The disk goes with the machine, in one moment as `watch` sees it.
        os.killpg(watch.pid, signal.SIGSTOP)
        world.end_processes()
        for home in (world.path / "workers").glob("*"):
            home.rename(world.path / f"gone{home.name}")
        saved = int(world.read(f"{bucket}/step"))
        world.write("tpu-vm", "PREEMPTED")
        os.killpg(watch.pid, signal.SIGCONT)
        until(lambda: len(world.starts()) == 4)
        world.write("finish", "0")
        _, errors = watch.communicate(timeout=HANG)
        assert watch.returncode == 0, errors
    assert "vm is PREEMPTED" in errors
    assert world.verbs() == ["create", "delete", "create"]
    assert [first for _, first, _ in world.starts()] == [0, 0, saved, saved]
    for worker, _, words in world.starts():
        home = world.path / "workers" / worker
        assert words == ["--distributed", f"--workdir={home}/runs/vm", *FLAGS]
    assert not list((world.path / bucket).glob("*orbax-checkpoint-tmp*"))
    until(lambda: world.read(f"{bucket}/step") == world.read("workers/0/runs/vm/step"))

    assert world.run("fetch", "--bucket=gs://b/p")[0] == 0
    assert world.read("runs/vm/step") == world.read(f"{bucket}/step")
    assert world.run("delete", "--bucket=gs://b/p")[0] == 0
    status, _, error = world.run("delete", "--bucket=gs://b/p")
    assert (status, "there is no vm" in error) == (0, True)


def test_every_step_may_be_given_again(world):
    for _ in range(2):
        for step in ("create", "install"):
            status, out, error = world.run(step)
            assert status == 0, error
    assert "installed already" in out
    assert world.verbs() == ["create"]
    assert (world.path / "workers/1/resnet_flax/.git").is_dir()  # Runs record the commit.
    for said in ("vm started", "vm is running already"):
        _, out, error = world.run("start", "--", *FLAGS)
        assert out.count(said) == 2, out + error
    until(lambda: len(world.starts()) == 2)
    assert world.run("status")[1].split() == ["READY", "running", "running"]
    until(lambda: "training" in world.read("workers/0/runs/.vm.log"))
    for _ in range(2):
        assert world.run("stop")[0] == 0
    # Told to stop: not the end of the run, whatever the program's own status.
    assert world.run("status")[1].split() == ["READY", "ended", "143", "ended", "143"]
    assert "training" in world.run("follow")[1]
    assert world.run("fetch")[0] == 0
    assert world.read("runs/vm/step") == world.read("workers/0/runs/vm/step")
    assert len(world.starts()) == 2


def test_a_run_that_fails_is_not_started_again(world):
    world.write("finish", "3")
    status, _, error = world.run("watch", "--", *FLAGS)
    assert status == 1
    assert "vm has failed" in error
    assert "2 ended 3" in error
    assert len(world.starts()) == 2


QUOTA = "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'X' exceeded."


@pytest.mark.parametrize(
    ("files", "command", "messages", "verbs"),
    [
        ({"refusal": QUOTA}, ["create"], ["Quota limit 'X' exceeded", "v5litepod-8 in z"], 1),
        ({"refusal": QUOTA}, ["watch", "--", "x"], ["Quota limit 'X'", "no quota for v5l"], 1),
        # Lost as soon as it was made.
        ({"after_queued-resources": "ACCEPTED\nFAILED"}, ["create", "--queued"],
         ["vm is FAILED", "error: gcloud could not make vm"], 1),
        # A question without an answer is not taken for absence.
        ({"tpu-vm": "?"}, ["create"], ["Reauthentication failed"], 0),
        ({"project": ""}, ["watch", "--", "x"], ["error: no Google Cloud project: give --proj"], 0),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_an_error(world, files, command, messages, verbs):
    for name, content in files.items():
        world.write(name, content)
    status, _, error = world.run(*command)
    assert status == 1
    assert "error: " in error
    assert all(message in error for message in messages)
    assert world.verbs() == ["create"] * verbs


def test_watch_asks_again_where_there_is_no_capacity(world):
    world.write("refusal", "ERROR: There is no more capacity in the zone")
    with world.watching("--", "x") as watch:
        until(lambda: len(world.verbs()) > 1)
        assert watch.poll() is None


def test_queued_resources(world):
    world.write("after_queued-resources", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    options = ["--queued", "--spot", "--type=v5litepod-16", "--project=p"]
    status, _, error = world.run("create", *options)
    assert status == 0, error
    create = next(call for call in world.lines("calls.jsonl") if "create" in call)
    assert create == [
        *"compute tpus queued-resources create vm --node-id=vm".split(),
        "--runtime-version=v2-alpha-tpuv5-lite",
        *"--accelerator-type=v5litepod-16 --spot --zone=z --project=p --quiet".split(),
    ]
    assert "vm is WAITING_FOR_RESOURCES" in error
    # Preempted: the queued resource is suspended, and must go before its name is free again.
    world.write("queued-resources", "SUSPENDED")
    assert world.run("create", "--queued")[0] == 0
    assert world.verbs() == ["create", "delete", "create"]
    delete = next(call for call in world.lines("calls.jsonl") if "delete" in call)
    assert "--force" in delete


@pytest.mark.parametrize(
    "command",
    ["create", "install", "start", "follow", "status", "watch", "stop", "fetch", "delete"],
)
def test_dry_run_does_nothing(world, command):
    flags = ["--", *FLAGS] if command in ("start", "watch") else []
    before = [p.name for p in world.path.iterdir()]
    status, out, error = world.run(command, "--dry_run", "--bucket=gs://b", *flags)
    assert status == 0, error
    assert "+ gcloud " in out
    assert [p.name for p in world.path.iterdir()] == before
    if flags:
        # Through two shells, the flags arrive as they were given.
        (start,) = (line for line in out.splitlines() if re.search(r"worker\.sh.*start", line))
        print_words = ["bash", "-c", f"printf '%s\\0' {start}"]
        words = subprocess.run(print_words, capture_output=True, text=True).stdout.split("\0")
        (sent,) = (w for w in words if w.startswith("--command="))
        assert shlex.split(sent)[-2:] == FLAGS


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
    command = ["/bin/bash", f"{ROOT}/launch/tpu_vm.sh", *options]
    env = {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def test_workers_commands_by_hand(tmp_path):
    def worker(*words):
        command = ["bash", f"{ROOT}/launch/worker.sh", *words]
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        return subprocess.run(command, env=env, capture_output=True, text=True)

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
