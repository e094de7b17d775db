"""Several seeds in one process: each is the run that it would be alone, and leaves its files."""

import json
import shutil

import jax
import numpy as np
import pytest

from resnet_flax.data.dataset import Part
from resnet_flax.devices import distributed, sharding
from resnet_flax.errors import UserError
from resnet_flax.runs import metrics, weights
from resnet_flax.runs.progress import SEEDS
from resnet_flax.training import feed, scoring, seeds, setup, train, trained
from tests import conftest
from tests.test_train import assert_same_end

FIRST = 3
NAMES = "seed3", "seed4"


def make_config(count=2, devices=1):
    config = conftest.make_small_config()
    config.seed, config.train.num_seeds, config.train.cpu_devices = FIRST, count, devices
    config.data.split, config.eval.every_steps = "45k/5k", 6
    return config


def alone(config, seed):
    config = config.copy_and_resolve_references()
    config.seed, config.train.num_seeds = seed, 1
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_for_once):
    """Two runs with a device each."""
    config, directory = make_config(devices=2), tmp_path_factory.mktemp("finished") / "runs"
    return config, directory, train.train(config, directory)


def test_each_is_the_run_that_it_would_be_alone(finished, tmp_path):
    _, directory, result = finished
    assert sorted(p.name for p in directory.iterdir()) == list(NAMES)
    single = train.train(alone(make_config(), 4), tmp_path / "seed4")
    assert_same_end(directory / "seed4", tmp_path / "seed4")
    ours = result[SEEDS][1]
    assert ours["test_loss_last"] == single["test_loss_last"]
    assert set(ours) - set(single) == {"seeds_in_program"}
    both = directory / "seed4", tmp_path / "seed4"
    names = [{p.name for f in (d, d / "checkpoints") for p in f.iterdir()} for d in both]
    assert names[0] == names[1]
    assert {json.loads((d / "run.json").read_text())["devices"] for d in both} == {1}
    # No two nets are the same.
    kernels = [
        weights.load(directory / name / "weights.safetensors").variables["params"]["head"]["kernel"]
        for name in NAMES
    ]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_each_device_has_whole_nets_or_all_have_a_part_of_each():
    mesh = sharding.make_mesh(jax.devices()[:2], 16)
    assert seeds.meshes(mesh, 3) == [mesh] * 3
    one = seeds.meshes(mesh, 4)
    assert [m.devices.flat[0] for m in one] == [*mesh.devices.flat, *mesh.devices.flat]
    assert all(m.size == 1 for m in one)
    assert seeds.meshes(one[0], 3) == [one[0]] * 3


def test_the_nets_of_one_device_share_its_images():
    mesh = sharding.make_mesh(jax.devices()[:1], 16)
    configs = [one for one, _ in seeds.split(make_config(), conftest.ROOT)]
    put = feed.put_once()
    setups = [
        setup.build(one, data, mesh, put=put)
        for one, data in zip(configs, seeds.load_data(configs), strict=True)
    ]
    parts = [s.dataset.train for s in setups]
    assert all(isinstance(p, Part) and p.whole is parts[0].whole for p in parts)
    assert len({id(s.train_feed.resident["images"]) for s in setups}) == 1


def test_on_a_gpu_they_are_branches_of_one_program(finished, tmp_path, monkeypatch):
    platform = sharding.platform
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    lone, other = (sharding.make_mesh([device], 16) for device in jax.devices()[:2])
    assert seeds.programs([lone, other, lone, other]) == [[0, 2], [1, 3]]
    monkeypatch.setattr(sharding, "platform", platform)
    assert seeds.programs([lone, other, lone, other]) == [[0], [1], [2], [3]]
    # Each is the net that it is alone, but for rounding.
    monkeypatch.setattr(seeds, "programs", lambda meshes: [list(range(len(meshes)))])
    config = make_config()
    config.train.total_steps = 4
    result = train.train(config, tmp_path)
    assert [r["seed"] for r in result[SEEDS]] == [3, 4]
    for name in NAMES:
        paths = (d / name / "metrics.jsonl" for d in (finished[1], tmp_path))
        lone, own = (metrics.of_split(metrics.read_records(p), "train") for p in paths)
        assert [r["step"] for r in own] == [2, 4]
        losses = [[r["loss"] for r in records[:2]] for records in (own, lone)]
        np.testing.assert_allclose(*losses, rtol=1e-3)


def everything(directory):
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    return {p: p.stat().st_mtime_ns for p in files}


def test_finished_runs_are_left_alone(finished, capsys):
    config, directory, result = finished
    before = everything(directory)
    assert train.train(config, directory) == json.loads(json.dumps(result))
    assert train.train(alone(config, 4), directory / "seed4")["seed"] == 4
    assert capsys.readouterr().err.count("is finished") == 3
    assert everything(directory) == before


def test_stopped_and_damaged_they_go_on_together_or_alone(finished, tmp_path, capsys):
    """On one device, where they take turns."""
    config, uninterrupted = make_config(), finished[1]
    directory = tmp_path / "runs"
    assert conftest.stop_at_step(config, directory, 7)["stopped"] == 7
    other = config.copy_and_resolve_references()
    other.optim.learning_rate = 0.2
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.1 -> 0\.2"):
        train.train(other, directory)
    # One loses its last checkpoint, and goes on alone.
    newest = directory / "seed4" / "checkpoints" / "7"
    victim = max(newest.rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    stopped = conftest.stop_at_step(alone(config, 4), directory / "seed4", 9)
    assert stopped["stopped"] == 9
    assert "resumed from step 6 of 12" in capsys.readouterr().err
    # Then the other catches up with it.
    train.train(config, directory)
    said = capsys.readouterr().err
    assert "seed3: resumed from step 7 of 12" in said
    assert "seed4: resumed from step 9 of 12" in said
    for name in NAMES:
        assert_same_end(directory / name, uninterrupted / name)


def test_a_run_in_a_group_of_an_older_version_is_refused(finished, tmp_path):
    config, uninterrupted, _ = finished
    directory = tmp_path / "runs"
    shutil.copytree(uninterrupted, directory)
    path = directory / "seed4" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"group": "seeds3-4"}))
    # Not a finished one, beside one whose result is made again.
    (directory / "seed3" / "result.json").unlink()
    train.train(config, directory)
    assert (directory / "seed3" / "result.json").exists()
    shutil.rmtree(directory / "seed4" / "checkpoints")
    with pytest.raises(UserError, match=r"begun by resnet_flax 0\.1\.0 .*seeds3-4"):
        train.train(config, directory)


def test_what_does_not_go_with_several_seeds(tmp_path, monkeypatch):
    config = make_config()
    with pytest.raises(UserError, match="--checkpoint_dir goes with one seed only"):
        train.train(config, tmp_path / "runs", checkpoint_dir=str(tmp_path / "c"))
    config.data.name = "folder"
    with pytest.raises(UserError, match=r"num_seeds=2 needs .* not config.data.name=folder"):
        train.train(config, tmp_path / "runs")
    config.data.name = "digits"
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(UserError, match="num_seeds=2 is for one process"):
        seeds.split(config, tmp_path)
    monkeypatch.undo()
    for seed, count, message in ((2**31 - 1, 2, "the seed 2147483648"), (0, 0, "=0 must lie in")):
        config.seed, config.train.num_seeds = seed, count
        with pytest.raises(UserError, match=message):
            train.train(config, tmp_path / "runs")
    with pytest.raises(UserError, match="scores one net, config.train.num_seeds=2"):
        scoring.score(make_config(), str(tmp_path), None)
    assert list(tmp_path.iterdir()) == []


def test_one_that_diverges_is_named(finished, tmp_path):
    lost = weights.load(finished[1] / "seed3" / "weights.safetensors")
    lost.variables["params"]["head"]["kernel"] *= 1e38
    weights.save(tmp_path / "lost.safetensors", lost)
    with pytest.raises(UserError, match=r"seed[34]: the loss is (nan|inf) at step 1") as info:
        train.train(make_config(), tmp_path, str(tmp_path / "lost.safetensors"))
    assert "learning rate 0.1" in str(info.value)
    assert "last good checkpoint: none" in str(info.value)
    assert not any((tmp_path / name / "result.json").exists() for name in NAMES)


def test_they_begin_from_weights_with_a_last_layer_each(finished, tmp_path):
    file = finished[1] / "seed3" / "weights.safetensors"
    config = make_config()
    config.model.num_classes = 12
    conftest.stop_at_step(config, tmp_path, 0, init_weights=str(file))
    loaded = weights.load(file)
    begun = [trained.read_checkpoint(tmp_path / name, print) for name in NAMES]
    for one in begun:
        np.testing.assert_array_equal(one.mean, loaded.mean)
        stems = [x.variables["params"]["stem_conv"]["kernel"] for x in (one, loaded)]
        np.testing.assert_array_equal(*stems)
    heads = [one.variables["params"]["head"]["kernel"] for one in begun]
    assert heads[0].shape == (64, 12)
    assert np.abs(heads[0] - heads[1]).max() > 1e-3
