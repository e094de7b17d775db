"""SIGKILL at any moment: the same command goes on, to the same end."""

import itertools
import random
import signal

import pytest

from tests.faults import harness, moments


@pytest.mark.long
def test_killed_in_a_row(undisturbed, tmp_path):
    """SIGKILL three times: in a save, in an evaluation, at the end"""
    run = harness.Run(tmp_path / "run")
    for moment in (moments.saving, moments.evaluating, moments.ending):
        run.kill(moment(run))
    run.finish_as(undisturbed())


@pytest.mark.long
@pytest.mark.parametrize("moment", moments.RANDOM)
def test_killed(undisturbed, tmp_path, note, moment, attempt):
    """SIGKILL {moment}"""
    chosen = random.Random(f"{moment} {attempt}")
    devices = chosen.choice((1, 2))
    for number in itertools.count():
        # Missed moments (the process was quicker) are tried again, and not counted.
        assert number < 5, "ended five times before it could be killed"
        run = harness.Run(tmp_path / str(number), devices)
        make, longest = moments.RANDOM[moment]
        after = chosen.randrange(0, 30)
        with_after = make in (moments.saving, moments.unlisted, moments.evaluating)
        predicate = make(run, after) if with_after else make(run)
        process = run.start()
        if process.hit(signal.SIGKILL, predicate, chosen.uniform(0, longest)):
            break
        process.wait()
    assert process.wait().code == -signal.SIGKILL
    where = moments.describe(run)
    run.finish_as(undisturbed(devices))
    note(f"{devices} device(s), killed {where}; began at steps {run.resumed_from()}")
