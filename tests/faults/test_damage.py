"""Damage to what lies on the disk: noticed, and passed over, mended, or refused by name."""

import random
import shutil

import pytest

from tests.faults import harness, moments

KINDS = "truncated", "emptied", "bit-flipped", "removed"
LAST, BEFORE = str(harness.STEPS), harness.STEPS - harness.SAVE_EVERY


def damage(path, kind):
    """Damages a file; returns False where it is empty and so cannot be."""
    content = bytearray(path.read_bytes())
    if kind == "removed":
        path.unlink()
    elif not content:
        return False
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "emptied":
        path.write_bytes(b"")
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    return True


def copy_of(run, directory, *, finished=False):
    """A run that was killed when only its result was missing."""
    copy = harness.Run(directory)
    shutil.copytree(run.directory, directory)
    if not finished:
        (directory / "result.json").unlink()
        (directory / "weights.safetensors").unlink()
    return copy


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.long
def test_newest_damaged_and_log_cut(undisturbed, tmp_path):
    """Newest checkpoint truncated, and metrics.jsonl cut in mid-line"""
    run = copy_of(undisturbed(), tmp_path / "run")
    damage(max(files_of(run.directory / "checkpoints" / LAST), key=_size), "truncated")
    log = run.directory / "metrics.jsonl"
    log.write_bytes(run.read("metrics.jsonl")[:-20])
    outcome = run.finish()
    outcome.assert_finished()
    assert f"checkpoints/{LAST} is damaged" in outcome.err
    assert run.resumed_from() == [0, BEFORE]
    assert (run.directory / "damaged_checkpoints" / f"{LAST}.0").is_dir()
    harness.assert_same_end(run, undisturbed())


def _size(path):
    return path.stat().st_size


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_each_file_of_the_newest(undisturbed, tmp_path, each, kind):
    """Newest checkpoint, one file after the other: {kind}"""
    reference = undisturbed()
    number = len(files_of(reference.directory / "checkpoints" / LAST))
    assert number >= 4

    def check(i):
        run = copy_of(reference, tmp_path / str(i))
        file = files_of(run.directory / "checkpoints" / LAST)[i]
        if not damage(file, kind):
            return f"{file.name}: empty as it is"
        outcome = run.finish()
        outcome.assert_finished()
        # Without its list of files a checkpoint is as good as before.
        unharmed = kind == "removed" and file.name == "files.json"
        assert run.resumed_from() == [0, int(LAST) if unharmed else BEFORE], outcome.err
        harness.assert_same_end(run, reference)
        return f"{file.name}: went on from {run.resumed_from()[-1]}"

    each(range(number), check)


@pytest.mark.long
def test_all_checkpoints(undisturbed, tmp_path, each):
    """All checkpoints damaged: refused, and left as they are"""

    def check(kind):
        run = copy_of(undisturbed(), tmp_path / kind)
        for step in run.checkpoints():
            damage(max(files_of(run.directory / "checkpoints" / str(step)), key=_size), kind)
        before = content_of(run.directory)
        run.finish().assert_refused("checkpoints are damaged", "or start again in another")
        assert content_of(run.directory) == before

    each(KINDS, check)


def content_of(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in files_of(directory)}


# What comes of damage to a run's other files: an error that says this, or else it is mended.
REFUSED = {
    ("config.json", "truncated"): "config.json is damaged",
    ("config.json", "emptied"): "config.json is damaged",
    ("config.json", "bit-flipped"): "",
    ("config.json", "removed"): "without its config.json",
    ("run.json", "truncated"): "run.json is damaged",
    ("run.json", "emptied"): "run.json is damaged",
    ("run.json", "removed"): "without its run.json",
    **{("preprocess.safetensors", k): "preprocess.safetensors is missing or dam" for k in KINDS},
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["config.json", "run.json", "preprocess.safetensors"])
def test_identity_of_a_run(undisturbed, tmp_path, each, name):
    """{name} damaged or removed: refused by name, or nothing lost"""

    def check(kind):
        run = copy_of(undisturbed(), tmp_path / kind)
        assert damage(run.directory / name, kind)
        before = content_of(run.directory)
        outcome = run.finish()
        if (name, kind) in REFUSED or outcome.code:
            outcome.assert_refused(REFUSED.get((name, kind), ""))
            assert content_of(run.directory) == before
            return f"{kind}: {outcome.err.strip().replace(str(tmp_path), '')[:100]}"
        outcome.assert_finished()
        harness.assert_same_end(run, undisturbed())
        return f"{kind}: went on"

    each(KINDS, check)


@pytest.mark.long
@pytest.mark.parametrize("name", ["result.json", "weights.safetensors"])
def test_results_are_made_again(undisturbed, tmp_path, each, name):
    """{name} of a finished run damaged or removed: made again"""

    def check(kind):
        run = copy_of(undisturbed(), tmp_path / kind, finished=True)
        assert damage(run.directory / name, kind)
        run.finish_as(undisturbed())

    each(KINDS, check)


@pytest.mark.long
def test_damaged_weights_are_not_scored(undisturbed, tmp_path, each):
    """weights.safetensors damaged or removed: `--mode=evaluate` refuses it"""

    def check(kind):
        file = tmp_path / f"{kind}.safetensors"
        file.write_bytes(undisturbed().read("weights.safetensors"))
        assert damage(file, kind)
        outcome = harness.evaluate(f"--weights={file}", logs=tmp_path / kind)
        outcome.assert_refused(str(file))

    each(KINDS, check)


@pytest.mark.long
def test_log(undisturbed, tmp_path, each):
    """metrics.jsonl damaged or removed: what is lost is said, the training loses nothing"""

    def check(kind):
        run = copy_of(undisturbed(), tmp_path / kind)
        assert damage(run.directory / "metrics.jsonl", kind)
        outcome = run.finish()
        outcome.assert_finished()
        harness.assert_same_state(run, undisturbed())
        steps = [(r["split"], r["step"]) for r in run.records()]
        assert len(steps) == len(set(steps))
        assert "metrics.jsonl lacks" in outcome.err
        return f"{kind}: {outcome.err.partition('metrics.jsonl ')[2].splitlines()[0]}"

    each(KINDS, check)


@pytest.mark.long
def test_log_cut_anywhere(undisturbed, tmp_path, note, each, attempt):
    """metrics.jsonl of a killed run cut in mid-line: mended, no step twice, none missing"""
    chosen = random.Random(attempt)
    run = harness.Run(tmp_path / "run")
    run.kill(moments.at_step(run, chosen.randrange(7, 35)))
    # A crash may lose what came after the last checkpoint, never what came before it.
    content = run.read("metrics.jsonl")
    saved = run.checkpoints()[-1]
    lines = content.splitlines(keepends=True)
    kept = sum(len(x) for x, r in zip(lines, run.records(), strict=True) if r["step"] <= saved)
    cut = chosen.randrange(kept, len(content))
    (run.directory / "metrics.jsonl").write_bytes(content[:cut])
    note(f"checkpoint {saved}, cut {cut - kept} bytes after its records")
    run.finish_as(undisturbed())
