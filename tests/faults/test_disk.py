"""A disk that is full or read-only, a directory that vanishes, a second process in it."""

import contextlib
import errno
import os
import shutil
import subprocess

import pytest

from tests.faults import harness, moments


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own, where the tests may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk takes root's rights")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Leaves no room; returns the file to delete to make some."""
    file = folder / "filler"
    with open(file, "wb", buffering=0) as filler:
        for size in (65536, 512):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * size)
    return file


def test_full_disk(undisturbed, tmp_path, small_disk):
    """Disk full from a step on: an error; with room again it goes on"""
    run = harness.Run(small_disk / "run", logs=tmp_path / "logs")
    process = run.start()
    # Between two saves: orbax's libraries have words of their own for a save that breaks off.
    saved = run.directory / "checkpoints" / str(harness.SAVE_EVERY) / "files.json"
    assert process.hit(None, saved.exists)
    filler = fill(small_disk)
    process.go_on()
    # Which file is the first that finds no room depends on the moment.
    process.wait().assert_refused(os.strerror(errno.ENOSPC))
    assert run.checkpoints()
    filler.unlink()
    run.finish_as(undisturbed())


@pytest.mark.long
def test_full_disk_with_tensorboard(undisturbed, tmp_path, small_disk):
    """Disk full, TensorBoard events too: an error, no hanging"""
    run = harness.Run(
        small_disk / "run", 2, "--config.log.tensorboard=True", logs=tmp_path / "logs"
    )
    process = run.start()
    assert process.hit(None, moments.at_step(run, 12))
    filler = fill(small_disk)
    process.go_on()
    process.wait().assert_refused(os.strerror(errno.ENOSPC), noise=True)
    filler.unlink()
    run.finish().assert_finished()
    harness.assert_same_state(run, undisturbed())


@pytest.mark.long
@pytest.mark.parametrize("moment", ["at the start", "during a save", "at the end"])
def test_full_disk_at(undisturbed, tmp_path, small_disk, moment):
    """Disk full {moment}: an error; with room again it goes on"""
    run = harness.Run(small_disk / "run", logs=tmp_path / "logs")
    if moment == "at the start":
        filler = fill(small_disk)
        outcome = run.finish()
    else:
        process = run.start()
        make = moments.saving if moment == "during a save" else moments.ending
        assert process.hit(None, make(run))
        filler = fill(small_disk)
        process.go_on()
        outcome = process.wait()
    # At the end, too, a save is under way.
    outcome.assert_refused(os.strerror(errno.ENOSPC), noise=moment != "at the start")
    filler.unlink()
    run.finish_as(undisturbed())


@pytest.mark.long
def test_full_home_and_temporary_directory(undisturbed, tmp_path, small_disk):
    """Home, temporary directory and compilation cache on a full disk: finished all the same"""
    fill(small_disk)
    names = "HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "JAX_COMPILATION_CACHE_DIR"
    run = harness.Run(tmp_path / "run")
    run.finish_as(undisturbed(), env=dict.fromkeys(names, str(small_disk)))


@pytest.mark.long
def test_file_size_limit(undisturbed, tmp_path):
    """A limit to the size of files that checkpoints exceed: an error; without it, it goes on"""
    run = harness.Run(tmp_path / "run")
    run.finish(shell="ulimit -f 200").assert_refused(os.strerror(errno.EFBIG), noise=True)
    run.finish_as(undisturbed())


@pytest.mark.long
def test_read_only(undisturbed, tmp_path, small_disk):
    """Read-only disk, before a run and for one that was stopped: refused; writable, it goes on"""

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    run = harness.Run(small_disk / "run", logs=tmp_path / "logs")
    remount("ro")
    run.finish().assert_refused("cannot write in workdir")
    remount("rw")
    run.kill(moments.at_step(run, 12))
    remount("ro")
    run.finish().assert_refused("cannot write in workdir")
    scores = harness.evaluate(f"--weights={run.directory}", logs=tmp_path / "scores")
    assert scores.code == 0, scores.err
    remount("rw")
    run.finish_as(undisturbed())


@pytest.mark.long
def test_vanished(undisturbed, tmp_path, each):
    """Directory removed, moved away or replaced while the run goes on: an error that says so"""

    def check(how):
        run = harness.Run(tmp_path / how)
        process = run.start()
        assert process.hit(None, moments.at_step(run, 12))
        away = tmp_path / f"{how}.away"
        if how == "removed":
            shutil.rmtree(run.directory)
        else:
            run.directory.rename(away)
        if how == "replaced":
            other = undisturbed().directory
            shutil.copytree(other, run.directory)
        process.go_on()
        outcome = process.wait()
        outcome.assert_refused(f"{run.directory}", noise=True)
        # The latter where a save was under way.
        reasons = "was removed or replaced while the run", "could not save a checkpoint"
        assert any(reason in outcome.err for reason in reasons), outcome.err
        if how == "replaced":
            assert run.read("result.json") == undisturbed().read("result.json")
        elif run.directory.exists():
            shutil.rmtree(run.directory)
        if how == "moved away":
            away.rename(run.directory)
        run.finish_as(undisturbed())

    each(["removed", "moved away", "replaced"], check)
