"""What a run says of itself."""

import queue
import time

from resnet_flax.runs import progress
from tests.processes import HANG


def test_time_left_does_not_count_what_came_before_the_first_steps(monkeypatch, capsys):
    now = iter([0.0, 600.0, 610.0])  # Ten minutes of compiling, then ten seconds.
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    shown = progress.Progress(seconds_between_lines=1)
    shown.start(300, 0)
    shown.update(100, 1.0, 0.5, 0.1, 10)
    shown.update(200, 1.0, 0.5, 0.1, 10)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 100/300  batch loss 1.000  batch error 50.0 %  rate 0.1  10 images/s"
    assert second.endswith("10 images/s  00:10 left")


def test_several_seeds_say_where_the_curves_of_each_are(tmp_path):
    result = {
        "model": "resnet20", "data": "cifar10", "test_error_last": 0.1, "test_wrong_last": 1,
        "test_examples": 10, "steps": 5, "seconds": 2.0,
    }  # fmt: skip
    text = progress.summary({progress.SEEDS: [result | {"seed": k} for k in (3, 4)]}, tmp_path)
    for seed in (3, 4):
        assert f"seed{seed}: resnet20 on cifar10: 10.00 % test error" in text
        assert f"{tmp_path}/seed{seed}/curves.png" in text


def test_a_long_wait_is_said_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 1e-3)
    shown, said = progress.Progress(), queue.Queue()
    monkeypatch.setattr(shown, "say", said.put)
    with shown.waiting("compiling"):
        pass  # pytest has no terminal.
    assert said.empty()
    shown._terminal = True
    with shown.waiting("compiling"):
        lines = [said.get(timeout=HANG) for _ in range(3)]
    assert lines == ["compiling: 0.001 s", "compiling: 0.002 s", "compiling: 0.004 s"]
