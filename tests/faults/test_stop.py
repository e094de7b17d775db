"""SIGTERM and Ctrl-C: a clean end that costs nothing, whenever they come."""

import random
import signal
import time

import pytest

from tests.faults import harness, moments


def stop(run, predicate, number=signal.SIGTERM, delay=0.0):
    """Sends a signal at a moment; returns the step at which the run says it stopped."""
    return stopped(run, run.start(), predicate, number, delay)


def stopped(run, process, predicate, number=signal.SIGTERM, delay=0.0):
    assert process.hit(number, predicate, delay), "ended before it could be stopped"
    outcome = process.wait()
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    assert f"Stopped by {number.name} at step " in outcome.out, outcome.out
    step = int(outcome.out.partition("at step ")[2].partition(";")[0])
    assert run.checkpoints()[-1] == step
    assert not (run.directory / "result.json").exists()
    return step


def test_second_process_and_sigterm(undisturbed, tmp_path):
    """SIGKILL in a save; a second process on the same directory is refused; SIGTERM in a save"""
    run = harness.Run(tmp_path / "run")
    every = harness.SAVE_EVERY
    run.kill(moments.saving(run, after=every))
    saved = run.checkpoints()[-1]
    first = run.start()
    # In saves of its own: the killed one has left a half-written checkpoint.
    assert first.hit(None, moments.saving(run, after=saved + every))
    run.finish().assert_refused("another process is training in workdir")
    first.go_on()
    step = stopped(run, first, moments.saving(run, after=saved + 2 * every))
    run.finish_as(undisturbed())
    assert run.resumed_from() == [0, saved, step]


@pytest.mark.long
@pytest.mark.parametrize("moment", ["at any step", "during a save", "during an evaluation"])
def test_sigterm(undisturbed, tmp_path, note, moment, attempt):
    """SIGTERM {moment}"""
    chosen = random.Random(f"SIGTERM {moment} {attempt}")
    devices = chosen.choice((1, 2))
    run = harness.Run(tmp_path / "run", devices)
    make, longest = moments.RANDOM[moment]
    step = stop(run, make(run), delay=chosen.uniform(0, longest))
    note(f"{devices} device(s), stopped at step {step}")
    run.finish_as(undisturbed(devices))
    assert run.resumed_from() == [0, step]


@pytest.mark.long
@pytest.mark.parametrize(
    ("moment", "make"),
    [("while it starts", lambda run: lambda: True), ("while it compiles", moments.compiling)],
    ids=["starts", "compiles"],
)
def test_sigterm_before_the_first_step(undisturbed, tmp_path, note, moment, make, attempt):
    """SIGTERM {moment}: an end at once or a clean stop, nothing half-written"""
    chosen = random.Random(f"{moment} {attempt}")
    run = harness.Run(tmp_path / "run")
    process = run.start()
    process.hit(signal.SIGTERM, make(run), chosen.uniform(0, 1.5))
    outcome = process.wait()
    note(f"exit status {outcome.code}, {moments.describe(run)}")
    assert outcome.code in (0, -signal.SIGTERM)
    assert "Traceback" not in outcome.err
    run.finish_as(undisturbed())


@pytest.mark.long
def test_sigterm_again_and_again(undisturbed, tmp_path, note):
    """SIGTERM at every start, until the run is finished"""
    run = harness.Run(tmp_path / "run")
    steps = [0]
    while steps[-1] < 30:
        steps.append(stop(run, moments.at_step(run, steps[-1] + 8)))
    note(f"stopped at steps {steps[1:]}")
    run.finish_as(undisturbed())
    assert run.resumed_from() == steps


@pytest.mark.long
def test_sigterm_at_the_end(undisturbed, tmp_path):
    """SIGTERM while the result is written: it is written"""
    run = harness.Run(tmp_path / "run")
    process = run.start()
    assert process.hit(signal.SIGTERM, moments.ending(run))
    process.wait().assert_finished()
    harness.assert_same_end(run, undisturbed())


@pytest.mark.long
def test_ctrl_c(undisturbed, tmp_path):
    """Ctrl-C, once"""
    run = harness.Run(tmp_path / "run")
    step = stop(run, moments.at_step(run, 7), signal.SIGINT)
    run.finish_as(undisturbed())
    assert run.resumed_from() == [0, step]


@pytest.mark.long
def test_ctrl_c_again_and_again(undisturbed, tmp_path, note):
    """Ctrl-C again and again: an end at once, no traceback"""
    run = harness.Run(tmp_path / "run")
    process = run.start()
    assert process.hit(signal.SIGINT, moments.at_step(run, 12))
    # A process that is busy takes two at once for one.
    while process.process.poll() is None:
        time.sleep(0.05)
        process.process.send_signal(signal.SIGINT)
    outcome = process.wait()
    note(f"exit status {outcome.code}, {moments.describe(run)}")
    assert "Traceback" not in outcome.err
    assert outcome.code in (0, 130, -signal.SIGINT), outcome.err
    run.finish_as(undisturbed())


@pytest.mark.long
def test_ctrl_c_while_it_starts(undisturbed, tmp_path, note, attempt):
    """Ctrl-C while it starts: no traceback, nothing half-written"""
    chosen = random.Random(f"Ctrl-C {attempt}")
    run = harness.Run(tmp_path / "run")
    process = run.start()
    process.hit(signal.SIGINT, moments.claimed(run), chosen.uniform(0, 2.0))
    outcome = process.wait()
    note(f"exit status {outcome.code}, {moments.describe(run)}")
    assert outcome.code in (0, 130), outcome.err
    assert "Traceback" not in outcome.err
    run.finish_as(undisturbed())
