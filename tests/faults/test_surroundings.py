"""What lies around a run: its clock, data, numbers, output, home and temporary directory."""

import json
import os
import pathlib
import signal

import pytest

from tests.conftest import ROOT
from tests.faults import harness, moments


def patched(folder: pathlib.Path, code: str) -> dict[str, str]:
    """Environment in which every Python process runs `code` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.mark.long
def test_diverging(tmp_path):
    """Learning rate 1e6: stops with step, rate and last good checkpoint, which is finite"""
    flags = "--config.optim.learning_rate=1e6", "--config.optim.schedule=constant"
    run = harness.Run(tmp_path / "run", 2, *flags)
    outcome = run.finish()
    outcome.assert_refused(" at step ", "learning rate 1e+06", "last good checkpoint: ")
    assert not (run.directory / "result.json").exists()
    named = outcome.err.partition("last good checkpoint: ")[2].splitlines()[0]
    if run.checkpoints():
        assert named == str(run.directory / "checkpoints" / str(run.checkpoints()[-1]))
        harness.assert_finite(run)
    else:
        assert named == "none"


@pytest.mark.long
def test_diverging_later(undisturbed, tmp_path):
    """Diverging after good steps: the checkpoint before is kept, and finite"""
    flags = ("--config.checkpoint.every_steps=1", "--config.optim.warmup_rate=1e-3",
             "--config.optim.warmup_steps=12", "--config.optim.learning_rate=1e6")  # fmt: skip
    run = harness.Run(tmp_path / "run", 2, *flags)
    for _ in range(2):  # Given again, it ends as before: nothing has been overwritten.
        run.finish().assert_refused(" at step ", "last good checkpoint: ", "/checkpoints/")
        assert run.checkpoints()[-1] >= 12
        harness.assert_finite(run)


CLOCK = """
import time
real, calls = time.time, 0
def back():
    global calls
    calls += 1
    return real() - 3600 * calls
time.time = back
"""


@pytest.mark.long
def test_clock(undisturbed, tmp_path):
    """A clock that goes back an hour at every look: no negative time, the same end"""
    env = patched(tmp_path / "site", CLOCK)
    run = harness.Run(tmp_path / "run")
    process = run.start(env=env)
    assert process.hit(signal.SIGTERM, moments.at_step(run, 17))
    assert process.wait().code == 0
    run.finish_as(undisturbed(), env=env)
    result = json.loads(run.read("result.json"))
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert all(r.get("images_per_second", 1) > 0 for r in run.records())


DATA = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "resnet_flax.data.digits":
            sys.meta_path.remove(self)
            import numpy
            original = numpy.loadtxt
            def loadtxt(*args, **options):
                table = original(*args, **options)
                table[1000, 36] = 16 - table[1000, 36]
                return table
            numpy.loadtxt = loadtxt
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.long
def test_changed_data(undisturbed, tmp_path):
    """One pixel of the data changes under a stopped run: refused; restored, it goes on"""
    run = harness.Run(tmp_path / "run")
    run.kill(moments.at_step(run, 17))
    outcome = run.finish(env=patched(tmp_path / "site", DATA))
    outcome.assert_refused("digits is not the one that the run in", "fingerprint")
    run.finish_as(undisturbed())


@pytest.mark.long
@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_broken_pipe(undisturbed, tmp_path, which):
    """Nobody reads {which} any more (a broken pipe): the run is finished all the same"""
    run = harness.Run(tmp_path / "run")
    reading, writing = os.pipe()
    os.close(reading)
    names = ("stdout", "stderr") if which == "both" else (which,)
    outcome = run.finish(**dict.fromkeys(names, writing))
    os.close(writing)
    assert outcome.code == 0, outcome.err
    assert outcome.err == "" or which == "stdout"
    assert "Traceback" not in outcome.err
    assert "Broken pipe" not in outcome.err
    harness.assert_same_end(run, undisturbed())


@pytest.mark.long
def test_closed_streams(undisturbed, tmp_path):
    """No stdin, stdout and stderr at all: the run is finished all the same"""
    run = harness.Run(tmp_path / "run")
    assert run.finish(shell="exec <&- >&- 2>&-").code == 0
    harness.assert_same_end(run, undisturbed())


@pytest.mark.long
def test_log_on_a_full_disk(undisturbed, tmp_path):
    """stderr on a full disk: the run is finished all the same"""
    run = harness.Run(tmp_path / "run")
    with open("/dev/full", "wb") as full:
        outcome = run.finish(stderr=full)
    outcome.assert_finished()
    harness.assert_same_end(run, undisturbed())


ENVIRONMENTS = {
    "HOME unset": ({}, ("HOME",)),
    "HOME not writable": ({"HOME": "/proc/none"}, ()),
    "TMPDIR not there": ({"TMPDIR": "/proc/none"}, ()),
    "TERM unset": ({}, ("TERM",)),
    "an ASCII locale": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ()),
    "no access to its compilation cache": ({"JAX_COMPILATION_CACHE_DIR": "/proc/none"}, ()),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("surroundings", ENVIRONMENTS)
def test_environment(undisturbed, tmp_path, surroundings):
    """{surroundings}: the run is finished all the same"""
    env, remove = ENVIRONMENTS[surroundings]
    run = harness.Run(tmp_path / "run")
    run.finish_as(undisturbed(), env=env, remove=remove)


NO_TEMPORARY = """
import tempfile
tempfile._candidate_tempdir_list = lambda: ["/proc/none"]
"""


@pytest.mark.long
def test_no_temporary_directory(undisturbed, tmp_path):
    """No writable temporary directory and no home: finished all the same, but for curves.png"""
    env = patched(tmp_path / "site", NO_TEMPORARY) | {"HOME": "/proc/none"}
    run = harness.Run(tmp_path / "run")
    outcome = run.finish(env=env)
    outcome.assert_finished()
    assert "curves.png could not be drawn: Matplotlib" in outcome.err
    harness.assert_same_state(run, undisturbed())
    # With a home again, nothing more is to be done.
    assert "is finished" in run.finish().err


@pytest.mark.long
def test_terminal(undisturbed, tmp_path):
    """A terminal that is hung up while the run shows its bar: stopped at once, goes on later"""
    run = harness.Run(tmp_path / "run")
    main, side = os.openpty()
    process = run.start(stderr=side, stdout=side, start_new_session=True)
    os.close(side)
    assert process.hit(None, moments.at_step(run, 12))
    os.close(main)
    process.process.send_signal(signal.SIGHUP)
    process.go_on()
    assert process.wait().code in (0, -signal.SIGHUP)
    run.finish_as(undisturbed())
