"""Whole runs in this process: what they leave, and that stopping them changes nothing."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from resnet_flax.config import flatten
from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint, files, metrics, weights
from resnet_flax.runs.directory import Directory
from resnet_flax.training import loop, scoring, train, trained
from tests import conftest


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_for_once):
    """An uninterrupted run, with a validation split and averaged weights."""
    config = conftest.make_small_config()
    config.data.split = "45k/5k"
    config.optim.ema_decay = 0.5
    config.log.every_steps = 3
    directory = tmp_path_factory.mktemp("finished") / "run"
    return config, directory, train.train(config, directory)


def final_tree(directory):
    steps = checkpoint.steps_in(directory / "checkpoints")
    return checkpoint.read(directory / "checkpoints" / str(steps[-1]))


def assert_same_end(a, b):
    """Equal to the bit: parameters, statistics, momentum, averages, and the training records."""
    records = [
        [r | {"images_per_second": 0} for r in metrics.read_records(path / "metrics.jsonl")]
        for path in (a, b)
    ]
    assert records[0] == records[1]
    (tree_a, _), (tree_b, _) = final_tree(a), final_tree(b)
    jax.tree.map(np.testing.assert_array_equal, tree_a, tree_b)


def test_a_run_leaves_what_it_promises(finished):
    _, directory, result = finished
    names = {p.name for p in directory.iterdir()}
    assert {"config.json", "run.json", "metrics.jsonl", "curves.png", "result.json",
            "weights.safetensors", "checkpoints"} <= names  # fmt: skip
    assert json.loads((directory / "result.json").read_text()) == json.loads(
        json.dumps(result, default=list)
    )
    assert result["model"] == "resnet8"
    assert (result["seed"], result["steps"]) == (0, 12)
    for key in ("test_error_last", "test_error_at_best_validation", "test_error_best_is_leakage",
                "train_error_last"):  # fmt: skip
        assert 0 <= result[key] <= 1
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert "cpu" in result["hardware"]
    assert result["test_wrong_last"] == round(result["test_error_last"] * result["test_examples"])
    run = json.loads((directory / "run.json").read_text())
    assert run["parameters"] == 75_290
    assert len(run["data"]["validation_draw"]) == run["data"]["validation_examples"] > 100
    assert run["starts"][0]["versions"]["jax"] == jax.__version__
    stored = json.loads((directory / "config.json").read_text())
    assert stored["data.split"] == "45k/5k"


def test_records_come_when_they_are_due(finished):
    _, directory, _ = finished
    records = metrics.read_records(directory / "metrics.jsonl")
    steps = {s: [r["step"] for r in metrics.of_split(records, s)] for s in ("train", "test")}
    assert steps == {"train": [3, 6, 9, 12], "test": [4, 8, 12]}
    rates = [r["rate"] for r in metrics.of_split(records, "train")]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.001], rtol=1e-5)
    assert all(r["examples"] == 48 for r in metrics.of_split(records, "train"))


def test_the_best_checkpoint_is_chosen_by_validation(finished):
    _, directory, result = finished
    records = metrics.of_split(metrics.read_records(directory / "metrics.jsonl"), "validation")
    best = min(records, key=lambda r: r["error"])["step"]
    assert result["best_validation_step"] == best
    assert best in checkpoint.steps_in(directory / "checkpoints")


@pytest.fixture(scope="module")
def with_every_option(tmp_path_factory, compiled_for_once):
    """The same of nearly every option that there is."""
    c = conftest.make_small_config()
    c.model.dtype = "bfloat16"
    c.model.remat = True
    c.model.bn_group_size = 8
    c.model.survival = 0.4
    c.optim.name = "adam"
    c.optim.learning_rate = 1e-3
    c.optim.decay_factors = (0.5, 0.25)
    c.optim.label_smoothing = 0.1
    c.optim.decay_norm_and_bias = False
    c.optim.warmup_linear = True
    c.optim.warmup_steps = 3
    c.optim.ema_decay = 0.5
    c.data.flip = True
    c.data.fill = "edge"
    c.data.normalize = "pixel_mean_255"
    c.eval.bn_examples = 64
    c.eval.every_steps = 8
    c.checkpoint.every_steps = 3
    directory = tmp_path_factory.mktemp("with_every_option") / "run"
    return c, directory, train.train(c, directory)


def stop_in_evaluation(config, directory):
    """Trains until the last evaluation, in which a SIGTERM comes."""
    original = loop.Loop._evaluate_if_due

    def signal_then_score(self, run):
        if run.step == config.train.total_steps:
            self.stop_signal = signal.SIGTERM
        return original(self, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_evaluate_if_due", signal_then_score)
        return train.train(config, directory)


def test_whatever_happens_to_a_run_it_comes_to_the_same_end(with_every_option, tmp_path, capsys):
    """Stopped, damaged and made longer; the first record that differs tells after which of them."""
    config, uninterrupted, result = with_every_option
    directory, shorter = tmp_path / "run", config.copy_and_resolve_references()
    shorter.train.total_steps = 8
    for step in (0, 0, 5):
        stopped = conftest.stop_at_step(shorter, directory, step)
        assert stopped == {"stopped": step, "signal": "SIGTERM"}
        assert not (directory / "result.json").exists()
        assert step in checkpoint.steps_in(directory / "checkpoints")
    # A damaged checkpoint costs time but nothing else: the run goes on from the one before.
    victim = max((directory / "checkpoints" / "5").rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    # An evaluation that did not take place is made up for before anything else.
    assert stop_in_evaluation(shorter, directory) == {"stopped": 8, "signal": "SIGTERM"}
    said = capsys.readouterr().err
    assert "5 is damaged" in said
    assert "resumed from step 3 of 8" in said
    assert (directory / "damaged_checkpoints" / "5.0").is_dir()
    # The records that the run passed a second time have been kept, too.
    assert metrics.read_records(directory / "metrics.superseded.jsonl")
    assert not (directory / "result.json").exists()
    assert metrics.read_records(directory / "metrics.jsonl")[-1]["split"] == "train"
    before = train.train(shorter, directory)
    # A finished run goes on to more steps.
    longer = train.train(config, directory)
    assert_same_end(directory, uninterrupted)
    assert (longer["steps"], longer["test_loss_last"]) == (12, result["test_loss_last"])
    record = json.loads((directory / "run.json").read_text())
    assert (record["extended"], record["total_steps"]) == ([{"from": 8, "to": 12}], 12)
    kept = json.loads((directory / "result_8.json").read_text())
    assert kept["test_error_last"] == before["test_error_last"]


def test_every_option_takes_effect(with_every_option):
    _, directory, result = with_every_option
    losses = [r["loss"] for r in metrics.read_records(directory / "metrics.jsonl")]
    assert np.isfinite(losses).all()
    assert json.loads((directory / "run.json").read_text())["dtype"] == "bfloat16"
    file = directory / "weights.safetensors"
    loaded = weights.load(file)
    assert loaded.model["survival"] == 0.4
    np.testing.assert_array_equal(loaded.std, [255])
    assert scoring.score(None, None, str(file))["test"]["wrong"] == result["test_wrong_last"]
    # Statistics were estimated again: early on, the running ones lag far behind.
    running = final_tree(directory)[0]["ema"]["batch_stats"]
    gap = running["stem_bn"]["mean"] - loaded.variables["batch_stats"]["stem_bn"]["mean"]
    assert np.abs(gap).max() > 1e-3


def test_a_finished_run_is_left_alone(finished):
    config, directory, result = finished
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}
    again = train.train(config, directory)
    assert again["test_error_last"] == result["test_error_last"]
    assert before == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.name != ".lock"}


def test_a_workdir_of_another_config_is_refused_naming_the_keys(finished, small_config):
    _, directory, _ = finished
    small_config.data.split = "45k/5k"
    small_config.optim.ema_decay = 0.5
    small_config.optim.learning_rate = 0.2
    small_config.seed = 3
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0\.1 -> 0\.2; seed: 0 -> 3"):
        train.train(small_config, directory)


def without(name):
    return lambda directory: (directory / name).unlink()


def change_data(directory):
    run = json.loads((directory / "run.json").read_text())
    run["data"]["fingerprint"] = "0" * 64
    (directory / "run.json").write_text(json.dumps(run))


def flip_preprocessing(directory):
    content = bytearray((directory / "preprocess.safetensors").read_bytes())
    content[-3] ^= 1
    (directory / "preprocess.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (without("config.json"), "holds a run without its config.json"),
        (without("run.json"), "holds a run without its run.json"),
        (change_data, "the data set digits is not the one that the run .* began with"),
        (flip_preprocessing, r"preprocess\.safetensors is missing or damaged"),
    ],
)
def test_a_run_whose_files_do_not_agree_is_refused(finished, tmp_path, alter, message):
    config, uninterrupted, _ = finished
    shutil.copytree(uninterrupted, tmp_path / "run")
    alter(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        train.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=message):
        scoring.score(None, str(tmp_path / "run"), None)


def begin(directory, config):
    """What a start on a run's directory writes there before the first step."""
    record = {"total_steps": config.train.total_steps}
    with Directory.open(directory) as opened:
        opened.check_config(flatten(config))
        opened.write_start(flatten(config), record, (np.zeros(3), np.ones(3)), {"step": 0})


def of_length(config, steps, **changes):
    config = config.copy_and_resolve_references()
    config.train.total_steps = steps
    config.update_from_flattened_dict(changes)
    return config


def test_only_more_steps_at_the_same_rates_are_the_same_run(small_config, tmp_path):
    directory = tmp_path / "run"
    begin(directory, of_length(small_config, 12))
    begin(directory, of_length(small_config, 18))
    with pytest.raises(UserError, match=r"another config.*train\.total_steps: 18 -> 12"):
        begin(directory, of_length(small_config, 12))
    with pytest.raises(UserError, match="seed: 0 -> 1; train.total_steps: 18 -> 24"):
        begin(directory, of_length(small_config, 24, seed=1))
    small_config.optim.schedule = "cosine"
    begin(tmp_path / "cosine", of_length(small_config, 1))
    with pytest.raises(UserError, match=r"another config.*train\.total_steps: 1 -> 2"):
        begin(tmp_path / "cosine", of_length(small_config, 2))


class Killed(BaseException):
    pass


def kill_after(name, directory, config):
    """Begins, and is killed once the file of this name is written."""
    write = files.write_json

    def write_and_die(path, content):
        write(path, content)
        if path.name == name:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "write_json", write_and_die)
        with pytest.raises(Killed):
            begin(directory, config)


@pytest.mark.parametrize(
    ("name", "again", "entries"),
    [
        ("run.json", 14, [{"from": 12, "to": 14}]),
        ("run.json", 12, []),
        ("config.json", 14, [{"from": 12, "to": 14}]),
    ],
)
def test_a_start_that_was_killed_as_the_run_grew_is_repeated_or_taken_back(
    name, again, entries, small_config, tmp_path
):
    begin(tmp_path, of_length(small_config, 12))
    (tmp_path / "result.json").write_text('{"steps": 12}')
    kill_after(name, tmp_path, of_length(small_config, 14))
    begin(tmp_path, of_length(small_config, again))
    run = Directory(tmp_path)
    assert (run.config["train.total_steps"], run.record["total_steps"]) == (again, again)
    assert run.record["extended"] == entries
    assert run.finished(again) is None  # It is made again; the old one is kept.
    assert (tmp_path / "result_12.json").exists()


def test_a_run_of_which_only_the_configuration_is_written_begins_anew(small_config, tmp_path):
    kill_after("config.json", tmp_path, of_length(small_config, 12))
    begin(tmp_path, of_length(small_config, 14))
    run = Directory(tmp_path)
    assert (run.config["train.total_steps"], run.record["total_steps"]) == (14, 14)
    np.testing.assert_array_equal(run.preprocessing(), [np.zeros(3), np.ones(3)])


def test_evaluation_of_checkpoint_and_weights_agree_with_the_result(finished, capsys):
    config, directory, result = finished
    percent = f"test: error {100 * result['test_error_last']:.2f} % ({result['test_wrong_last']} of"
    from_run = scoring.describe(scoring.score(None, str(directory), None))
    assert percent in from_run
    assert "step 12" in from_run
    assert json.loads((directory / "evaluation.json").read_text())["test"]["examples"] == 359
    file = str(directory / "weights.safetensors")
    assert percent in scoring.describe(scoring.score(config, None, file))
    one = str(directory / "checkpoints" / "12")
    assert percent in scoring.describe(scoring.score(None, None, one))


def test_a_flipped_bit_in_a_weights_file_is_noticed(finished, tmp_path):
    _, directory, _ = finished
    content = bytearray((directory / "weights.safetensors").read_bytes())
    for position in (len(content) // 2, len(content) - 1):
        content[position] ^= 1
        (tmp_path / "w.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"w\.safetensors is damaged: its content does not"):
            weights.load(tmp_path / "w.safetensors")
        content[position] ^= 1


def test_weights_describe_themselves_and_begin_a_new_run(finished, small_config, tmp_path):
    _, directory, result = finished
    file = directory / "weights.safetensors"
    loaded = weights.load(file)
    assert loaded.model == {
        "name": "resnet8", "shortcut": "A", "num_classes": 10, "stride_in_3x3": False,
        "survival": 1.0,
    }  # fmt: skip
    assert loaded.class_names == tuple("0123456789")
    assert loaded.training["test_error_last"] == result["test_error_last"]
    assert loaded.mean.shape == (32, 32, 3)
    conftest.stop_at_step(small_config, tmp_path / "run", 0, init_weights=str(file))
    tree, _ = final_tree(tmp_path / "run")
    begun = {key: tree[key] for key in ("params", "batch_stats")}
    jax.tree.map(np.testing.assert_array_equal, begun, loaded.variables)


def test_weights_that_fit_another_net_are_refused_too(finished, small_config, tmp_path):
    """A plain net's arrays have the shapes of a residual one's."""
    _, directory, _ = finished
    loaded = weights.load(directory / "weights.safetensors")
    loaded.model["shortcut"] = "none"
    weights.save(tmp_path / "plain.safetensors", loaded)
    with pytest.raises(UserError, match="its shortcut is 'none', but 'A' here"):
        scoring.score(small_config, None, str(tmp_path / "plain.safetensors"))
    with pytest.raises(UserError, match="its shortcut is 'none', but 'A' here"):
        train.train(small_config, tmp_path / "run", str(tmp_path / "plain.safetensors"))
    loaded.model["shortcut"] = "A"
    del loaded.model["survival"]  # As in a file that says nothing of it: then it is 1.
    weights.save(tmp_path / "older.safetensors", loaded)
    small_config.model.survival = 0.5
    with pytest.raises(UserError, match=r"its survival is 1\.0, but 0\.5 here"):
        scoring.score(small_config, None, str(tmp_path / "older.safetensors"))
    loaded.variables["params"]["head"]["bias"][0] = np.nan
    weights.save(tmp_path / "nan.safetensors", loaded)
    with pytest.raises(UserError, match="params/head/bias is not finite"):
        weights.load(tmp_path / "nan.safetensors")


def test_a_run_from_weights_keeps_their_preprocessing_and_may_have_other_classes(
    finished, small_config, tmp_path
):
    _, directory, _ = finished
    loaded = weights.load(directory / "weights.safetensors")
    changed = dataclasses.replace(
        loaded, mean=np.full(3, 99, np.float32), std=np.full(3, 50, np.float32)
    )
    weights.save(tmp_path / "w.safetensors", changed)
    small_config.model.num_classes = 12
    small_config.train.total_steps = 1
    small_config.optim.learning_rate = 1e-12
    given = str(tmp_path / "w.safetensors")
    conftest.stop_at_step(small_config, tmp_path / "run", 0, init_weights=given)
    # Started again without the file, the run still knows.
    result = train.train(small_config, tmp_path / "run")
    tuned = weights.load(tmp_path / "run" / "weights.safetensors")
    np.testing.assert_array_equal(tuned.mean, changed.mean)
    np.testing.assert_array_equal(tuned.std, changed.std)
    assert tuned.variables["params"]["head"]["kernel"].shape == (64, 12)
    stem = [v["params"]["stem_conv"]["kernel"] for v in (tuned.variables, loaded.variables)]
    np.testing.assert_allclose(*stem, atol=1e-8)
    # It has more outputs than there are classes.
    found = scoring.score(None, str(tmp_path / "run"), None)
    assert found["test"]["wrong"] == result["test_wrong_last"]
    assert len(found["test"]["confusion"]) == 12
    assert (tmp_path / "run/confusion.png").exists()
    # Without a checkpoint it needs the file.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="began with the weights file with SHA-256"):
        train.train(small_config, tmp_path / "run")
    digest = files.sha256_of(given)
    Directory(tmp_path / "run").check_initial_weights(digest, resuming=False)


def test_an_evaluation_with_another_config_than_the_run_s_is_refused(finished, small_config):
    _, directory, _ = finished
    with pytest.raises(UserError, match=r"data\.split: '45k/5k' -> 'all'"):
        scoring.score(small_config, str(directory), None)


def test_keys_that_did_not_exist_when_a_run_began_stand_at_their_defaults(finished, tmp_path):
    config, uninterrupted, _ = finished
    shutil.copytree(uninterrupted, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    del stored["model.remat"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    train.train(config, tmp_path / "run")


def test_many_steps_a_dispatch_change_nothing_but_rounding(finished, tmp_path, monkeypatch):
    """The accelerators' way: chunks by `lax.scan`, the remainder step by step, two programs."""
    given, one_by_one, _ = finished
    config = given.copy_and_resolve_references()
    config.train.chunk_steps = 2
    compiled = set()
    original = loop.Loop._program

    def note(self, group, length, arguments):
        compiled.add(length)
        return original(self, group, length, arguments)

    monkeypatch.setattr(loop.Loop, "_program", note)
    result = train.train(config, tmp_path / "run")
    assert compiled == {1, 2}
    records = [metrics.read_records(d / "metrics.jsonl") for d in (one_by_one, tmp_path / "run")]
    due = [[(r["split"], r["step"]) for r in own] for own in records]
    assert due[0] == due[1]
    losses = [metrics.of_split(own, "train")[0]["loss"] for own in records]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert all(r["images_per_second"] > 0 for r in metrics.of_split(records[1], "train"))
    assert result["images_per_second"] > 0


def test_a_run_begins_from_a_file_a_run_or_a_published_name(finished, tmp_path):
    _, directory, _ = finished
    by_file = trained.read_weights(str(directory / "weights.safetensors"))
    by_run = trained.read_weights(str(directory))
    assert by_run.sha256 == by_file.sha256
    assert trained.read_weights("resnet20").weights.model["name"] == "resnet20"
    with pytest.raises(UserError, match="holds no weights.safetensors: finish the run first"):
        trained.read_weights(str(tmp_path))


def test_weights_of_another_net_name_the_first_mismatch(finished, small_config, tmp_path):
    _, directory, _ = finished
    small_config.model.name = "resnet20"
    with pytest.raises(
        UserError, match="is of another net: its name is 'resnet8', but 'resnet20' here"
    ):
        scoring.score(small_config, None, str(directory / "weights.safetensors"))
    with pytest.raises(UserError, match="resnet20 is of other classes .'airplane' to 'truck'"):
        scoring.score(None, None, "resnet20", overrides={"data.name": "digits"})
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read"):
        scoring.score(None, None, str(tmp_path / "text.safetensors"))
    with pytest.raises(UserError, match="does not exist"):
        scoring.score(None, None, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="nothing to evaluate"):
        scoring.score(None, None, None)


def test_checkpoints_may_lie_elsewhere_and_outlive_the_directory(finished, tmp_path):
    """As on a machine whose disk goes with it, while a bucket stays."""
    (config, uninterrupted, whole), bucket = finished, str(tmp_path / "bucket" / "run")
    halted = conftest.stop_at_step(config, tmp_path / "a", 6, checkpoint_dir=bucket)
    assert halted["stopped"] == 6
    assert checkpoint.steps_in(bucket)[-1] == 6
    assert not (tmp_path / "a" / "checkpoints").exists()
    # Known to the run from then on.
    with pytest.raises(UserError, match="has its checkpoints in .*bucket/run, not in"):
        train.train(config, tmp_path / "a", checkpoint_dir=str(tmp_path / "other"))
    assert "step 6" in scoring.describe(scoring.score(None, str(tmp_path / "a"), None))
    # Another machine, which knows nothing of the first but where the checkpoints are.
    other = config.copy_and_resolve_references()
    other.optim.learning_rate = 0.05
    with pytest.raises(UserError, match="those of another run.*learning_rate: 0.1 -> 0.05"):
        train.train(other, tmp_path / "b", checkpoint_dir=bucket)
    result = train.train(config, tmp_path / "c", checkpoint_dir=bucket)
    assert result["test_wrong_last"] == whole["test_wrong_last"]
    trees = [checkpoint.read(f"{d}/12")[0] for d in (uninterrupted / "checkpoints", bucket)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_bucket_that_cannot_be_reached_is_named(small_config, tmp_path):
    with pytest.raises(UserError, match="cannot reach gs://bucket/run: "):
        train.train(small_config, tmp_path / "run", checkpoint_dir="gs://bucket/run")
    assert not (tmp_path / "run").exists()
