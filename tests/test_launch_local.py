"""launch/local.sh and forward.sh, with a stand-in for the program and with the program itself."""

import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from tests import processes
from tests.conftest import ROOT

# Process 1 fails where it is told "fail" or "deaf"; "deaf" processes do not end on SIGTERM.
PROGRAM = r"""#!{python} -IS
import signal, sys, time
words = dict(w[2:].partition("=")[::2] for w in sys.argv[1:])
if "-c" in sys.argv[1:2]:
    exec(sys.argv[2])
    sys.exit()
do = words.get("do")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("begins", *sys.argv[3:], flush=True)
if do in ("fail", "deaf") and words["process_id"] == "1":
    print("oh dear", file=sys.stderr)
    sys.exit(5)
while do and not (stop and do != "deaf"):
    time.sleep(0.02)
print("ends", flush=True)
"""


@pytest.fixture
def env(tmp_path):
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return os.environ | {"PYTHON": str(program)}


def start(env, script, *arguments, stderr=subprocess.STDOUT):
    command = ["bash", f"{ROOT}/launch/{script}", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


def local(env, *arguments):
    """The exit status of local.sh and all output."""
    done = start(env, "local.sh", *arguments)
    out, _ = done.communicate(timeout=processes.HANG)
    return done.returncode, out


def test_every_process_gets_its_flags_and_lines_their_number(env):
    status, out = local(env, "3", "--config=a b", "--x=it's")
    assert status == 0
    lines = sorted(out.splitlines())
    port = lines[0].split("127.0.0.1:")[1].split()[0]
    place = f"--distributed --coordinator=127.0.0.1:{port} --num_processes=3"
    begun = [f"[{i}] begins {place} --process_id={i} --config=a b --x=it's" for i in range(3)]
    assert lines == sorted([*begun, *(f"[{i}] ends" for i in range(3))])


@pytest.mark.parametrize("do", ["fail", "deaf"])
def test_one_failure_ends_all_and_is_the_status(env, do):
    status, out = local(env | ({"GRACE": "0"} if do == "deaf" else {}), "2", f"--do={do}")
    assert status == 5
    assert "[1] oh dear" in out
    assert ("[0] ends" in out) == (do == "fail")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_every_process(env, number, status):
    done = start(env, "local.sh", "2", "--do=wait")
    assert all("begins" in done.stdout.readline() for _ in range(2))
    done.send_signal(number)
    out, _ = done.communicate(timeout=processes.HANG)
    assert sorted(out.split()) == ["[0]", "[1]", "ends", "ends"]
    assert done.returncode == status


def test_dry_run_starts_nothing(env):
    _, out = local(env, "2", "--dry_run", "--config=a b")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[-2:] for line in lines] == [[f"--process_id={i}", "--config=a b"] for i in (0, 1)]


def test_wrong_use(env):
    for arguments in ([], ["0"], ["-1"], ["x"], ["--config=y"]):
        status, out = local(env, *arguments)
        assert status == 2
        assert out.startswith("usage: local.sh N")
    status, out = local(env | {"PYTHON": "/nowhere/python"}, "2")
    assert status == 1
    assert out.startswith("error: no /nowhere/python on PATH")


@pytest.mark.parametrize(
    ("do", "number", "status"),
    [("", None, 0), ("fail", None, 5), ("wait", signal.SIGTERM, 143), ("wait", signal.SIGINT, 130)],
)
def test_forward(env, do, number, status):
    command = [env["PYTHON"], "-m", "x", "--process_id=1", f"--do={do}"]
    done = start(env, "forward.sh", *command, stderr=subprocess.DEVNULL)
    assert "begins" in done.stdout.readline()
    if number:
        done.send_signal(number)
    with done:
        out = done.stdout.read()  # Not communicate(), which loses what readline() has buffered.
    assert (done.returncode, out) == (status, "" if do == "fail" else "ends\n")


@pytest.mark.slow
def test_a_run_told_to_stop_goes_on_when_started_again(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    settings = {"model.bn_group_size": 16, "train.cpu_devices": 1}
    flags = processes.flags(f"{ROOT}/configs/quickstart.py", **settings)
    flags.append(f"--workdir={tmp_path}/run")
    first = start(env, "local.sh", "2", *flags)
    saved = lambda: any(tmp_path.glob("run/checkpoints/*/files.json"))  # noqa: E731
    processes.until(lambda: saved() or first.poll() is not None)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=processes.HANG)
    assert first.returncode == 143, out
    (step,) = re.findall(r"Stopped by SIGTERM at step (\d+)", out)
    status, out = local(env, "2", *flags)
    assert status == 0, out
    assert f"[0] resumed from step {step} of 24" in out
    assert "[0] resnet8 on digits:" in out
    assert "Traceback" not in out
