"""launch/local.sh and forward.sh, with a stand-in for the program and with the program itself."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

PROGRAM = r"""#!{python} -IS
import signal, sys, time
words = dict(w[2:].partition("=")[::2] for w in sys.argv[1:])
if "-c" in sys.argv[1:2]:
    exec(sys.argv[2])
    sys.exit()
number, what = words.get("process_id"), words.get("do")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("begins", *sys.argv[3:], flush=True)
if what == "fail" and number == "1":
    print("oh dear", file=sys.stderr)
    sys.exit(5)
while what and not (stop and what != "deaf"):
    time.sleep(0.02)
print("ends", flush=True)
"""


@pytest.fixture
def env(tmp_path):
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return os.environ | {"PYTHON": str(program)}


def local(env, *arguments):
    return subprocess.Popen(
        ["bash", f"{ROOT}/launch/local.sh", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_every_process_gets_its_flags_and_lines_their_number(env):
    done = local(env, "3", "--config=a b", "--x=it's")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 0
    begun = sorted(line for line in out.splitlines() if "begins" in line)
    assert len(begun) == 3
    ports = set()
    for i, line in enumerate(begun):
        assert line.startswith(f"[{i}] begins --distributed --coordinator=127.0.0.1:")
        assert line.endswith(f" --num_processes=3 --process_id={i} --config=a b --x=it's")
        ports.add(line.split("127.0.0.1:")[1].split()[0])
    assert len(ports) == 1
    assert sorted(line for line in out.splitlines() if "ends" in line) == [
        "[0] ends",
        "[1] ends",
        "[2] ends",
    ]


def test_one_failure_ends_all_and_is_the_status(env):
    done = local(env, "2", "--do=fail")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 5
    assert "[1] oh dear" in out
    assert "[0] ends" in out


def test_processes_that_do_not_end_are_killed(env):
    env = env | {"GRACE": "0"}
    env["PYTHON"] += "-deaf"
    with open(env["PYTHON"], "w") as file:
        text = PROGRAM.format(python=sys.executable)
        file.write(text.replace('what == "fail"', "what").replace('what != "deaf"', "False"))
    os.chmod(env["PYTHON"], 0o755)
    done = local(env, "2", "--do=it")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 5
    assert "ends" not in out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_every_process(env, number, status):
    done = local(env, "2", "--do=wait")
    for _ in range(2):
        assert "begins" in done.stdout.readline()
    done.send_signal(number)
    out = done.stdout.read()
    done.stdout.close()
    assert sorted(out.split()) == ["[0]", "[1]", "ends", "ends"]
    assert done.wait(timeout=60) == status


def test_dry_run_starts_nothing(env):
    out, _ = local(env, "2", "--dry_run", "--config=a b").communicate(timeout=60)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[-2:] for line in lines] == [[f"--process_id={i}", "--config=a b"] for i in (0, 1)]


@pytest.mark.parametrize("arguments", [[], ["0"], ["-1"], ["x"], ["--config=y"]])
def test_wrong_number_of_processes(env, arguments):
    done = local(env, *arguments)
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 2
    assert out.startswith("usage: local.sh N")


def test_no_interpreter():
    done = local(os.environ | {"PYTHON": "/nowhere/python"}, "2")
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 1
    assert out.startswith("error: no /nowhere/python on PATH")


@pytest.mark.parametrize(
    ("do", "number", "status"),
    [("", None, 0), ("fail", None, 5), ("wait", signal.SIGTERM, 143), ("wait", signal.SIGINT, 130)],
)
def test_forward(env, do, number, status):
    command = [env["PYTHON"], "-m", "x", "--process_id=1", f"--do={do}"]
    done = subprocess.Popen(
        ["bash", f"{ROOT}/launch/forward.sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert "begins" in done.stdout.readline()
    if number:
        done.send_signal(number)
    out = done.stdout.read()
    done.stdout.close()
    assert done.wait(timeout=60) == status
    assert out == ("" if do == "fail" else "ends\n")


@pytest.mark.slow
def test_a_run_told_to_stop_goes_on_when_started_again(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    flags = [
        f"--config={ROOT}/configs/quickstart.py",
        "--config.model.name=resnet8",
        "--config.model.bn_group_size=8",
        "--config.data.batch_size=16",
        "--config.train.cpu_devices=1",
        "--config.train.total_steps=24",
        "--config.optim.boundaries_steps=12,18",
        "--config.eval.every_steps=24",
        "--config.checkpoint.every_steps=4",
        "--config.log.tensorboard=False",
        f"--workdir={tmp_path}/run",
    ]
    first = local(env, "2", *flags)
    while not any(tmp_path.glob("run/checkpoints/*/files.json")) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 143, out
    (step,) = re.findall(r"Stopped by SIGTERM at step (\d+)", out)
    second = local(env, "2", *flags)
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0, out
    assert f"[0] resumed from step {step} of 24" in out
    assert "[0] resnet8 on digits:" in out
    assert "Traceback" not in out
