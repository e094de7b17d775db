"""SIGKILL at any moment: the same command goes on, to the same end."""

import itertools
import random
import signal

import pytest

from tests.faults import harness, moments

# name: (the moment, the longest random delay after it in seconds; 0: the very moment)
MOMENTS = {
    "while it starts": (lambda run: lambda: True, 2.0),
    "before the first step": (moments.begun, 2.0),
    "at any step": (lambda run: moments.at_step(run, 1), 2.0),
    "during a save": (moments.saving, 0),
    "between a save and its list of files": (moments.unlisted, 0),
    "during an evaluation": (moments.evaluating, 0),
    "while the result is written": (moments.ending, 0.4),
}


def test_killed_in_a_row(undisturbed, tmp_path):
    """SIGKILL four times: in a save, right after one, in an evaluation, at the end"""
    run = harness.Run(tmp_path / "run")
    chain = [
        moments.saving(run, after=5),
        moments.unlisted(run, after=10),
        moments.evaluating(run, after=20),
        moments.ending(run),
    ]
    for moment in chain:
        process = run.start()
        assert process.hit(signal.SIGKILL, moment), "ended before it could be killed"
        assert process.wait().code == -signal.SIGKILL
    run.finish().assert_finished()
    harness.assert_same_end(run, undisturbed())


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(undisturbed, tmp_path, note, moment, attempt):
    """SIGKILL {moment}"""
    chosen = random.Random(f"{moment} {attempt}")
    devices = chosen.choice((1, 2))
    for number in itertools.count():
        # Missed moments (the process was quicker) are tried again, and not counted.
        assert number < 5, "ended five times before it could be killed"
        run = harness.Run(tmp_path / str(number), devices)
        make, longest = MOMENTS[moment]
        after = chosen.randrange(0, 30)
        with_after = make in (moments.saving, moments.unlisted, moments.evaluating)
        predicate = make(run, after) if with_after else make(run)
        process = run.start()
        if process.hit(signal.SIGKILL, predicate, chosen.uniform(0, longest)):
            break
        process.wait()
    assert process.wait().code == -signal.SIGKILL
    where = moments.describe(run)
    run.finish().assert_finished()
    note(f"{devices} device(s), killed {where}; began at steps {run.resumed_from()}")
    harness.assert_same_end(run, undisturbed(devices))
