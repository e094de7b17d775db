"""Checkpoints: bit-exact, canonical, and every kind of damage noticed."""

import shutil

import jax
import numpy as np
import optax
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint
from resnet_flax.training import optim, state

NET = create_model("resnet8").clone(stage_sizes=(1,), widths=(4,))


def abstract_state(model, ema=True):
    rate = optim.scale_by_rate(optax.constant_schedule(0.1))
    return state.create_state(model, optim.sgd(rate), seed=0, ema=ema)


def make_state(*args, **options):
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(lambda: abstract_state(*args, **options))
    return jax.tree.map(lambda x: random.uniform(size=x.shape).astype(x.dtype), shapes)


def at_step(some, step):
    return some.replace(step=jax.numpy.asarray(step, jax.numpy.int32))


def tree_at(some, step):
    return checkpoint.to_tree(at_step(some, step))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints 5 and 10, and the state that was saved."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    current = make_state(NET)
    writer = checkpoint.Writer(directory, keep=2)
    writer.save(5, tree_at(current, 5), {"seconds": 0.1, "window": [1, 2.5, 0.25]})
    writer.save(10, tree_at(current, 10), {"seconds": 0.2})
    writer.close()
    return directory, current


def test_what_is_read_is_what_was_saved_to_the_bit(saved):
    directory, current = saved
    warnings = []
    step, tree, record = checkpoint.read_newest(directory, warnings.append, set_aside=False)
    assert (step, record, warnings) == (10, {"seconds": 0.2}, [])
    template = jax.eval_shape(lambda: current)
    assert_same(checkpoint.from_tree(tree, template, scanned=False), at_step(current, 10))
    assert checkpoint.read(directory / "5")[1] == {"seconds": 0.1, "window": [1, 2.5, 0.25]}


def test_scanned_and_unrolled_nets_read_each_other_s_checkpoints():
    model = NET.clone(stage_sizes=(3,))
    scanned, unrolled = (make_state(model.clone(scan=s)) for s in (True, False))
    scanned_template, template = (jax.eval_shape(lambda x=x: x) for x in (scanned, unrolled))
    tree = checkpoint.to_tree(scanned)
    assert_same(checkpoint.from_tree(tree, scanned_template, scanned=True), scanned)
    read = checkpoint.from_tree(tree, template, scanned=False)
    assert_same(checkpoint.to_tree(read), tree)
    assert_same(jax.tree.map(np.shape, read), jax.tree.map(np.shape, unrolled))


def test_newest_and_best_are_kept(tmp_path):
    current = make_state(NET, ema=False)
    writer = checkpoint.Writer(tmp_path / "c", keep=2)
    for step in range(1, 6):
        writer.best_step = min(step, 2)
        writer.save(step, tree_at(current, step), {})
    writer.close()
    assert checkpoint.steps_in(tmp_path / "c") == [2, 4, 5]


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def damage_file(file, damage):
    """Returns False where there is nothing to damage."""
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
        return True
    if damage == "flip" and content:
        content[len(content) // 2] ^= 0x10
    kept = {"truncate": len(content) // 2, "empty": 0, "flip": len(content)}[damage]
    file.write_bytes(content[:kept])
    return bool(content)


@pytest.mark.parametrize(
    "damage",
    ["flip", "remove", *(pytest.param(d, marks=pytest.mark.slow) for d in ("truncate", "empty"))],
)
def test_damage_to_any_file_of_the_newest_is_noticed_and_passed_over(saved, tmp_path, damage):
    directory, current = saved
    number = len(files_of(directory / "10"))
    assert number >= 4
    template = jax.eval_shape(lambda: current)
    for i in range(number):
        copy = tmp_path / str(i) / "checkpoints"
        shutil.copytree(directory, copy)
        file = files_of(copy / "10")[i]
        if not damage_file(file, damage):
            continue
        warnings = []
        step, tree, _ = checkpoint.read_newest(copy, warnings.append, set_aside=True)
        assert_same(checkpoint.from_tree(tree, template, False), at_step(current, step))
        # Without its list of files a checkpoint is as good as before.
        assert step == (10 if damage == "remove" and file.name == "files.json" else 5)
        if step == 5:
            assert len(warnings) == 1
            assert f"{copy}/10 is damaged" in warnings[0]
            assert (copy.parent / "damaged_checkpoints" / "10.0").is_dir()
            passed_over = copy
    writer = checkpoint.Writer(passed_over, keep=2)
    writer.save(10, tree_at(current, 10), {})
    writer.close()
    assert checkpoint.steps_in(passed_over) == [5, 10]


def test_a_flipped_bit_is_noticed_without_the_list_of_files(saved, tmp_path):
    """As after a kill between saving and listing; some bits of orbax's files mean nothing."""
    directory, current = saved
    template = jax.eval_shape(lambda: current)
    data = max(files_of(directory / "10"), key=lambda p: p.stat().st_size)
    for position in (0.1, 0.5, 0.9):
        copy = tmp_path / str(position) / "checkpoints"
        shutil.copytree(directory, copy)
        (copy / "10" / "files.json").unlink()
        content = bytearray(data.read_bytes())
        content[int(len(content) * position)] ^= 0x01
        (copy / data.relative_to(directory)).write_bytes(content)
        step, tree, _ = checkpoint.read_newest(copy, lambda _: None, set_aside=False)
        assert step == 5
        assert_same(checkpoint.from_tree(tree, template, False), at_step(current, 5))


def test_only_damaged_checkpoints_are_never_a_fresh_start(saved, tmp_path):
    directory, _ = saved
    copy = tmp_path / "checkpoints"
    shutil.copytree(directory, copy)
    for file in files_of(copy):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="all 2 checkpoints .* are damaged"):
        checkpoint.read_newest(copy, lambda _: None, set_aside=True)
    assert checkpoint.steps_in(copy) == [5, 10]


def test_an_interrupted_save_is_ignored_and_cleared_away(saved, tmp_path):
    directory, current = saved
    copy = tmp_path / "checkpoints"
    shutil.copytree(directory, copy)
    shutil.copytree(copy / "10", copy / "15.orbax-checkpoint-tmp")
    (copy / "notes.txt").write_text("mine")
    assert checkpoint.read_newest(copy, print, set_aside=True)[0] == 10
    writer = checkpoint.Writer(copy, keep=3)
    writer.save(15, tree_at(current, 15), {})
    writer.close()
    assert sorted(p.name for p in copy.iterdir()) == ["10", "15", "5", "notes.txt"]


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert checkpoint.read_newest(tmp_path / "none", print, set_aside=True) is None


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    current = make_state(NET, ema=False)
    broken = jax.tree.map(lambda x: x, current.params)
    broken["head"]["bias"][3] = np.nan
    writer = checkpoint.Writer(tmp_path / "c", keep=2)
    with pytest.raises(checkpoint.NotFiniteError, match="params/head/bias is not finite at step 0"):
        writer.save(0, checkpoint.to_tree(current.replace(params=broken)), {})
    writer.close()
    assert checkpoint.steps_in(tmp_path / "c") == []


def test_another_net_s_checkpoint_names_the_first_mismatch(saved):
    directory, _ = saved
    tree, _ = checkpoint.read(directory / "10")
    wider = jax.eval_shape(lambda: abstract_state(NET.clone(num_classes=7)))
    with pytest.raises(UserError, match=r"head/.* is float32 \[.*10\], but .*7\] here"):
        checkpoint.from_tree(tree, wider, False)
    deeper = jax.eval_shape(lambda: abstract_state(NET.clone(stage_sizes=(2,))))
    with pytest.raises(UserError, match="the checkpoint is of another net: it lacks .*block2"):
        checkpoint.from_tree(tree, deeper, False)
    lacking = jax.eval_shape(lambda: abstract_state(NET, ema=False))
    with pytest.raises(UserError, match="the checkpoint is of another net: it has ema/"):
        checkpoint.from_tree(tree, lacking, False)
