"""Several seeds in one program: each is the run that it would be alone, and leaves its files."""

import json
import shutil

import jax
import numpy as np
import pytest

from resnet_flax.data.dataset import Part
from resnet_flax.devices import distributed, sharding
from resnet_flax.errors import UserError
from resnet_flax.reporting import records
from resnet_flax.runs import checkpoint, metrics, progress, weights
from resnet_flax.training import account, experiment, handover, inputs, scoring, seeds, train
from tests import conftest
from tests.test_train import Crash, assert_same_end

FIRST = 3


def make_config(count=2, devices=2):
    config = conftest.make_small_config()
    config.seed, config.train.num_seeds, config.train.cpu_devices = FIRST, count, devices
    config.data.split = "45k/5k"
    return config


def alone(config, seed):
    config = config.copy_and_resolve_references()
    config.seed, config.train.num_seeds = seed, 1
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted program of two seeds; beside it lies what there was before its end."""
    config, directory = make_config(), tmp_path_factory.mktemp("finished") / "runs"
    original = handover.hand_out

    def copy_first(directories, accounts):
        shutil.copytree(directory, directory.with_name("ended"))
        original(directories, accounts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handover, "hand_out", copy_first)
        return config, directory, train.train(config, directory)


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (3, 2)])
def test_each_seed_is_trained_as_it_would_be_alone(count, devices):
    """Where each device has whole nets, and where every net's batch is split."""
    config = make_config(count, devices)
    config.data.flip = True
    mesh = sharding.make_mesh(jax.devices()[:devices], config.data.batch_size)
    one_device = sharding.make_mesh(jax.devices()[:1], config.data.batch_size)
    configs = seeds.member_configs(config)
    group = seeds.build(configs, seeds.load_data(configs), mesh)
    assert group.has_whole_nets == (count == 2)
    # One copy of the images, on the host and on the devices, though other ones are held out.
    parts = [member.dataset.train for member in group.members]
    assert all(isinstance(p, Part) and p.whole is parts[0].whole for p in parts)
    arrays = [m.train_feed.resident["images"] for m in group.members]
    assert all(a is arrays[0] for a in arrays)
    group_state = group.create_state()
    begun = group.host_states(group_state)
    arguments = group.train_feed.resident, group.train_feed.chunk(0, 1)
    group_chunk = group.make_train_chunk().lower(group_state, *arguments).compile()
    # Nothing is exchanged between devices that have whole nets.
    assert ("all-reduce" in group_chunk.as_text()) == (count == 3)
    # The last one alone.
    member, config = group.members[-1], configs[-1]
    run = experiment.build(config, inputs.load_data(config), one_device)
    np.testing.assert_array_equal(run.mean, member.mean)
    assert run.dataset.validation_draw == member.dataset.validation_draw
    assert run.dataset.fingerprint == member.dataset.fingerprint
    state, chunk = run.create_state(), run.make_train_chunk()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), begun[-1].params)
    # Its own examples are scored: as many as the run alone has, and just as well.
    ours = group.make_scorer()(group.evaluated(group_state, count - 1), member)
    theirs = run.make_scorer()(state.evaluated())
    assert ours.keys() == theirs.keys() == {"validation", "test"}
    for name in ours:
        assert ours[name].examples == theirs[name].examples
        np.testing.assert_allclose(ours[name].loss, theirs[name].loss, rtol=1e-5)
    for step in range(3):
        batches = group.train_feed.chunk(step, 1)
        group_state, sums = group_chunk(group_state, group.train_feed.resident, batches)
        batches = run.train_feed.chunk(step, 1)
        state, own = chunk(state, run.train_feed.resident, batches)
        close = {"rtol": 1e-5} if step == 0 else {"rtol": 2e-3}
        np.testing.assert_allclose(own["loss"][0], sums["loss"][0, -1], **close)
        assert sums["error"].shape == (1, count)
    ended, own = group.host_states(group_state), jax.device_get(state)
    for tree in ("params", "batch_stats", "opt_state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3),
            getattr(own, tree),
            getattr(ended[-1], tree),
        )
    # No two nets are the same, nor are their statistics.
    kernels = [s.params["stem_conv"]["kernel"] for s in begun]
    means = [s.batch_stats["stem_bn"]["mean"] for s in ended]
    for arrays in (kernels, means):
        assert np.abs(arrays[0] - arrays[1]).max() > 1e-3


def test_on_accelerators_the_nets_are_one_computation(monkeypatch):
    config = make_config(2, 1)
    config.model.scan = "always"
    mesh = sharding.make_mesh(jax.devices()[:1], config.data.batch_size)
    configs = seeds.member_configs(config)
    group = seeds.build(configs, seeds.load_data(configs), mesh)
    # Two steps a dispatch, as there.
    losses, arguments = [], (group.train_feed.resident, group.train_feed.chunk(0, 2))
    for backend in ("cpu", "gpu"):
        state = group.create_state()
        monkeypatch.setattr(sharding, "platform", lambda mesh, backend=backend: backend)
        chunk = group.make_train_chunk().lower(state, *arguments)
        monkeypatch.undo()
        assert ("feature_group_count = 2" in chunk.as_text()) == (backend == "gpu")
        losses.append(jax.device_get(chunk.compile()(state, *arguments)[1]["loss"]))
    assert losses[0].shape == (2, 2)
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)


def test_each_leaves_the_files_of_an_ordinary_run(finished, tmp_path):
    config, directory, result = finished
    assert [r["seed"] for r in result[progress.SEEDS]] == [FIRST, FIRST + 1]
    assert sorted(p.name for p in directory.iterdir()) == ["seed3", "seed4"]
    single = tmp_path / "seed4"
    ordinary = train.train(alone(config, 4), single)
    own = directory / "seed4"
    assert {p.name for p in own.iterdir()} == {p.name for p in single.iterdir()}
    for name in ("config.json", "preprocess.safetensors"):
        assert (own / name).read_bytes() == (single / name).read_bytes()
    runs = [json.loads((d / "run.json").read_text()) for d in (own, single)]
    assert runs[0].pop("group") == "seeds3-4"
    for key in set(runs[1]) - {"starts"}:
        assert runs[0][key] == runs[1][key], key
    results = [json.loads((d / "result.json").read_text()) for d in (own, single)]
    assert results[0].pop("seeds_in_program") == 2
    assert results[0].keys() == results[1].keys() == ordinary.keys()
    logs = [metrics.read_records(d / "metrics.jsonl") for d in (own, single)]
    assert [(r["split"], r["step"], r["examples"]) for r in logs[0]] == [
        (r["split"], r["step"], r["examples"]) for r in logs[1]
    ]
    np.testing.assert_allclose(logs[0][0]["loss"], logs[1][0]["loss"], rtol=1e-3)
    # What they are read by.
    percent = f"({results[0]['test_wrong_last']} of"
    for source in (own, own / "weights.safetensors", own / "checkpoints" / "12"):
        assert percent in scoring.score(None, None, str(source))
    # The newest two, and its own best.
    kept = checkpoint.steps_in(own / "checkpoints")
    assert set(kept) == {8, 12, results[0]["best_validation_step"]}
    for step in kept:
        _, history = checkpoint.read(own / "checkpoints" / str(step))
        assert history["run"]["config"]["seed"] == 4
    found = records.find([directory])
    assert found == [directory / "seed3", directory / "seed4"]
    keys = {records.load(path).key for path in (*found, single)}
    assert len(keys) == 1
    files = [weights.load(d / "weights.safetensors") for d in found]
    assert [f.training["seed"] for f in files] == [3, 4]


def everything(directory):
    return {
        p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_finished_runs_are_left_alone(finished, capsys):
    config, directory, result = finished
    before = everything(directory)
    again = train.train(config, directory)
    assert [r["test_error_last"] for r in again[progress.SEEDS]] == [
        r["test_error_last"] for r in result[progress.SEEDS]
    ]
    # Alone, too.
    assert train.train(alone(config, 4), directory / "seed4")["seed"] == 4
    assert capsys.readouterr().err.count("is finished") == 3
    assert everything(directory) == before


def test_stopped_and_damaged_they_go_on_to_the_same_end(finished, tmp_path, capsys):
    config, uninterrupted, _ = finished
    directory = tmp_path / "runs"
    assert conftest.stop_at_step(config, directory, 7)["stopped"] == 7
    place = directory / "seeds3-4" / "checkpoints"
    assert checkpoint.steps_in(place)[-1] == 7
    # One of them alone is not to be had yet, nor among others.
    before = everything(directory)
    with pytest.raises(UserError, match=r"with others: .* --config.seed=3 .*num_seeds=2 --workdir"):
        train.train(alone(config, 4), directory / "seed4")
    three = config.copy_and_resolve_references()
    three.train.num_seeds = 3
    with pytest.raises(UserError, match="seed3 was begun with seeds3-4, not with seeds3-5"):
        train.train(three, directory)
    other = config.copy_and_resolve_references()
    other.optim.learning_rate = 0.2
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.1 -> 0\.2"):
        train.train(other, directory)
    assert everything(directory) == before
    assert not (directory / "seed5").exists()
    victim = max((place / "7").rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    train.train(config, directory)
    assert "7 is damaged" in capsys.readouterr().err
    for name in ("seed3", "seed4"):
        assert_same_end(directory / name, uninterrupted / name)
    # What was set aside stays, nothing else.
    assert [p.name for p in (directory / "seeds3-4").iterdir()] == ["damaged_checkpoints"]


@pytest.mark.parametrize("moment", ["hand_out", "result", "clear"])
def test_a_kill_at_the_end_loses_nothing(finished, tmp_path, monkeypatch, moment):
    config, uninterrupted, _ = finished
    directory = tmp_path / "runs"
    stages = {
        "hand_out": (checkpoint.Writer, "save"),
        "result": (account.Account, "write_result"),
        "clear": (handover.shutil, "rmtree"),
    }
    owner, name = stages[moment]
    original = getattr(owner, name)

    def crash(first, *args, **kwargs):
        # In the middle of it: of the second net, or with the last checkpoints renamed.
        second = {
            "hand_out": lambda: "seed4" in str(getattr(first, "directory", "")),
            "result": lambda: first.directory.name == "seed4",
            "clear": lambda: not kwargs,
        }
        if second[moment]():
            raise Crash
        return original(first, *args, **kwargs)

    shutil.copytree(uninterrupted.with_name("ended"), directory)
    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(Crash):
        train.train(config, directory)
    monkeypatch.undo()
    train.train(config, directory)
    assert sorted(p.name for p in directory.iterdir()) == ["seed3", "seed4"]
    for name in ("seed3", "seed4"):
        assert_same_end(directory / name, uninterrupted / name)
        assert (directory / name / "result.json").exists()


def test_a_run_begun_alone_is_not_taken_in(finished, tmp_path):
    config, uninterrupted, _ = finished
    directory = tmp_path / "runs"
    shutil.copytree(uninterrupted / "seed4", directory / "seed4")
    run = json.loads((directory / "seed4" / "run.json").read_text())
    del run["group"]
    (directory / "seed4" / "run.json").write_text(json.dumps(run))
    before = everything(directory)
    with pytest.raises(UserError, match="seed4 was begun alone, not with seeds3-4"):
        train.train(config, directory)
    assert everything(directory) == before
    assert not (directory / "seed3").exists()
    # One of two that ended together has lost its result: it makes it again alone.
    shutil.rmtree(directory)
    shutil.copytree(uninterrupted, directory)
    (directory / "seed4" / "result.json").unlink()
    with pytest.raises(UserError, match=r"trained to its end together .*num_seeds=1"):
        train.train(config, directory)
    assert train.train(alone(config, 4), directory / "seed4")["seed"] == 4


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
        seeds.member_configs(config)
    monkeypatch.undo()
    config.seed = 2**31 - 1
    with pytest.raises(UserError, match="num_seeds=2 makes the seed 2147483648"):
        train.train(config, tmp_path / "runs")
    config.train.num_seeds = 0
    with pytest.raises(UserError, match="num_seeds=0 must lie in"):
        train.train(config, tmp_path / "runs")
    with pytest.raises(UserError, match="scores one net, config.train.num_seeds=2"):
        scoring.score(make_config(), str(tmp_path), None)
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_lost_is_named(tmp_path):
    config = make_config()
    config.optim.learning_rate = 1e6
    with pytest.raises(UserError, match=r"seed[34](: the loss is|/.* is not finite)"):
        train.train(config, tmp_path / "runs")


def test_they_begin_from_weights_with_a_last_layer_each(finished, tmp_path):
    config, directory, _ = finished
    file = directory / "seed3" / "weights.safetensors"
    config = make_config()
    config.model.num_classes, config.train.total_steps = 12, 1
    config.optim.learning_rate = 1e-12
    train.train(config, tmp_path / "runs", str(file))
    loaded = weights.load(file)
    tuned = [
        weights.load(tmp_path / "runs" / s / "weights.safetensors") for s in ("seed3", "seed4")
    ]
    for one in tuned:
        np.testing.assert_array_equal(one.mean, loaded.mean)
        np.testing.assert_allclose(
            one.variables["params"]["stem_conv"]["kernel"],
            loaded.variables["params"]["stem_conv"]["kernel"],
            atol=1e-8,
        )
    heads = [one.variables["params"]["head"]["kernel"] for one in tuned]
    assert np.abs(heads[0] - heads[1]).max() > 1e-3
