"""Ctrl-C is heard at any moment."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from resnet_flax import signals
from resnet_flax.training import loop
from tests import conftest

# Busy in C, where Python runs no handlers; like XLA it lets other threads run.
BUSY = """
import hashlib
print("begins", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def start(*arguments):
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=conftest.ROOT, **pipes)


@pytest.mark.parametrize("module", [None, "main", "tools.summary"])
def test_it_ends_a_program_that_runs_no_handlers(module, tmp_path):
    code = f"from resnet_flax import signals; signals.end_on_interrupt(){BUSY}"
    if module:  # The program still imports.
        (tmp_path / "jax.py").write_text(BUSY)
        code = f"""
import runpy, sys
sys.path.insert(0, {str(tmp_path)!r})
sys.argv[0], sys.orig_argv[1:] = "-m", ["-m", "resnet_flax.{module}"]
runpy.run_module("resnet_flax.{module}", run_name="__main__", alter_sys=True)
"""
    process = start("-c", code)
    assert process.stdout.readline() == "begins\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "interrupted\n")
    assert process.returncode == 130


def test_a_program_may_answer_it_and_a_notebook_gets_an_exception():
    heard = []

    def ask(number):
        heard.append(number)
        return len(heard) == 2

    def wait(until=lambda: False):
        while not until():
            time.sleep(0.01)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with signals.answered_by(ask, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(lambda: heard)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            wait()
    assert heard == [signal.SIGTERM, signal.SIGINT]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_is_ignored_stays_so():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.answered_by(lambda number: True, signal.SIGHUP):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_commands_are_listed_and_other_modules_refused():
    def run(*arguments):
        process = start("-m", *arguments)
        out, err = process.communicate()
        return process.returncode, out, err

    code, out, err = run("resnet_flax")
    assert (code, err) == (0, "")
    assert "python -m resnet_flax.main " in out
    assert "python -m resnet_flax.tools.predict " in out
    wrong = "resnet_flax.training.steps"
    message = f"error: {wrong} is no command; python -m resnet_flax lists them\n"
    assert run(wrong) == (1, "", message)
    code, out, err = run("resnet_flax.main", "--help")
    assert (code, err) == (0, "")
    assert "--config" in out


def test_one_ctrl_c_may_arrive_twice_and_a_second_one_is_final(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    run = types.SimpleNamespace(setup=types.SimpleNamespace(config=None), step=3)
    asked = loop.Loop([run], types.SimpleNamespace(say=said.append))
    assert asked._ask(signal.SIGINT)  # Nothing is lost before a step is done.
    run.step = 4
    assert not asked._ask(signal.SIGINT)
    assert not asked._ask(signal.SIGINT)  # As from `timeout -s INT`.
    assert said == ["SIGINT: saving, then stopping; Ctrl-C now ends at once"]
    now[0] += 1
    assert asked._ask(signal.SIGINT)
