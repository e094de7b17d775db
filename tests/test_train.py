"""Whole runs in this process: what they leave, and that stopping them changes nothing."""

import dataclasses
import json
import shutil
import signal

import jax
import numpy as np
import pytest

from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint, files, metrics, weights
from resnet_flax.training import loop, scoring, train, trained
from tests import conftest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, with a validation split and averaged weights."""
    config = conftest.make_small_config()
    config.data.split = "45k/5k"
    config.optim.ema_decay = 0.5
    directory = tmp_path_factory.mktemp("finished") / "run"
    return config, directory, train.train(config, directory)


def final_tree(directory):
    steps = checkpoint.steps_in(directory / "checkpoints")
    return checkpoint.read(directory / "checkpoints" / str(steps[-1]))


def assert_same_end(a, b):
    """Equal to the bit: parameters, statistics, momentum, averages, and the training records."""
    (tree_a, _), (tree_b, _) = final_tree(a), final_tree(b)
    jax.tree.map(np.testing.assert_array_equal, tree_a, tree_b)
    timing = ("images_per_second",)
    records = [
        [{k: v for k, v in r.items() if k not in timing} for r in metrics.read_records(path)]
        for path in (a / "metrics.jsonl", b / "metrics.jsonl")
    ]
    assert records[0] == records[1]


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
    assert steps == {"train": [2, 4, 6, 8, 10, 12], "test": [4, 8, 12]}
    rates = [r["rate"] for r in metrics.of_split(records, "train")]
    np.testing.assert_allclose(rates, [0.1] * 3 + [0.01, 0.001, 0.001], rtol=1e-5)
    assert all(r["examples"] == 32 for r in metrics.of_split(records, "train"))


def test_the_best_checkpoint_is_chosen_by_validation(finished):
    _, directory, result = finished
    records = metrics.of_split(metrics.read_records(directory / "metrics.jsonl"), "validation")
    best = min(records, key=lambda r: r["error"])["step"]
    assert result["best_validation_step"] == best
    assert best in checkpoint.steps_in(directory / "checkpoints")


def test_a_run_stopped_again_and_again_goes_on_to_the_same_end(finished, tmp_path):
    config, uninterrupted, _ = finished
    directory = tmp_path / "run"
    # As after a kill between the first two files.
    directory.mkdir()
    shutil.copy(uninterrupted / "config.json", directory)
    for step in (1, 4, 7):
        stopped = conftest.stop_at_step(config, directory, step)
        assert stopped == {"stopped": step, "signal": "SIGTERM"}
        assert not (directory / "result.json").exists()
        assert step in checkpoint.steps_in(directory / "checkpoints")
    train.train(config, directory)
    assert_same_end(directory, uninterrupted)


def test_a_signal_during_the_last_evaluation_ends_it(finished, tmp_path, monkeypatch):
    config, uninterrupted, _ = finished
    directory = tmp_path / "run"
    original = loop.Loop._evaluate_if_due

    def signal_then_score(self, net):
        if net.step == config.train.total_steps:
            self.stop_signal = signal.SIGTERM
        return original(self, net)

    monkeypatch.setattr(loop.Loop, "_evaluate_if_due", signal_then_score)
    stopped = train.train(config, directory)
    assert stopped == {"stopped": config.train.total_steps, "signal": "SIGTERM"}
    assert not (directory / "result.json").exists()
    monkeypatch.undo()
    train.train(config, directory)
    assert_same_end(directory, uninterrupted)


class Crash(BaseException):
    pass


def test_a_crash_between_checkpoint_and_evaluation_loses_nothing(finished, tmp_path, monkeypatch):
    """A due evaluation that the crash prevented is run after the restart, before any step."""
    config, uninterrupted, _ = finished
    directory = tmp_path / "run"

    original = loop.Loop._evaluate_if_due

    def crash(self, net):
        if net.step != 8:
            return original(self, net)
        self._save(net)
        net.close()
        raise Crash

    monkeypatch.setattr(loop.Loop, "_evaluate_if_due", crash)
    with pytest.raises(Crash):
        train.train(config, directory)
    monkeypatch.undo()
    assert checkpoint.steps_in(directory / "checkpoints")[-1] == 8
    assert [r["step"] for r in metrics.read_records(directory / "metrics.jsonl")][-1] == 8
    train.train(config, directory)
    assert_same_end(directory, uninterrupted)


def test_a_damaged_newest_checkpoint_costs_time_but_nothing_else(finished, tmp_path, capsys):
    config, uninterrupted, _ = finished
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    (directory / "result.json").unlink()
    victim = max((directory / "checkpoints" / "12").rglob("*"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    train.train(config, directory)
    assert "12 is damaged" in capsys.readouterr().err
    assert_same_end(directory, uninterrupted)
    assert (directory / "damaged_checkpoints" / "12.0").is_dir()
    # The records that the run passed a second time have been kept, too.
    assert metrics.read_records(directory / "metrics.superseded.jsonl")


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


def test_a_finished_run_goes_on_to_more_steps(finished, tmp_path):
    given, shorter, before = finished
    config = given.copy_and_resolve_references()
    shutil.copytree(shorter, tmp_path / "run")
    config.train.total_steps = 18
    whole = train.train(config, tmp_path / "whole")
    result = train.train(config, tmp_path / "run")
    assert (result["steps"], result["test_loss_last"]) == (18, whole["test_loss_last"])
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["extended"], record["total_steps"]) == ([{"from": 12, "to": 18}], 18)
    kept = json.loads((tmp_path / "run/result_12.json").read_text())
    assert kept["test_error_last"] == before["test_error_last"]
    config.train.total_steps = 12  # Not back again.
    with pytest.raises(UserError, match=r"another config.*train\.total_steps: 18 -> 12"):
        train.train(config, tmp_path / "run")
    config.train.total_steps, config.seed = 24, 1
    with pytest.raises(UserError, match="seed: 0 -> 1; train.total_steps: 18 -> 24"):
        train.train(config, tmp_path / "run")


def test_a_start_that_was_killed_as_the_run_grew_is_repeated_or_taken_back(finished, tmp_path):
    given, shorter, _ = finished
    longer = given.copy_and_resolve_references()
    longer.train.total_steps = 14

    class Killed(BaseException):
        pass

    def kill_after(name, config, directory):
        write = files.write_json

        def write_and_die(path, content):
            write(path, content)
            if path.name == name:
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "write_json", write_and_die)
            with pytest.raises(Killed):
                train.train(config, directory)

    def record(directory):
        return json.loads((directory / "run.json").read_text())

    for name, config in (("run.json", longer), ("run.json", given), ("config.json", longer)):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(shorter, tmp_path / "run")
        kill_after(name, longer, tmp_path / "run")
        total = config.train.total_steps
        assert train.train(config, tmp_path / "run")["steps"] == total
        assert record(tmp_path / "run")["total_steps"] == total
        entries = [] if config is given else [{"from": 12, "to": 14}]
        assert record(tmp_path / "run")["extended"] == entries
    # Before anything but the configuration was written, a run begins anew with the larger number.
    kill_after("config.json", given, tmp_path / "new")
    train.train(longer, tmp_path / "new")
    assert record(tmp_path / "new")["preprocess_sha256"]


def test_a_cosine_does_not_grow_longer(small_config, tmp_path):
    small_config.optim.schedule = "cosine"
    small_config.train.total_steps = 1
    train.train(small_config, tmp_path / "run")
    small_config.train.total_steps = 2
    with pytest.raises(UserError, match=r"another config.*train\.total_steps: 1 -> 2"):
        train.train(small_config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(small_config, tmp_path):
    small_config.optim.learning_rate = 1e6
    small_config.data.normalize = "pixel_mean"
    small_config.eval.every_steps = 1
    small_config.checkpoint.every_steps = 1
    with pytest.raises(UserError) as info:
        train.train(small_config, tmp_path / "run")
    message = str(info.value)
    assert "learning rate 1e+06" in message
    assert "last good checkpoint" in message
    assert not (tmp_path / "run" / "result.json").exists()


def test_evaluation_of_checkpoint_and_weights_agree_with_the_result(finished, capsys):
    config, directory, result = finished
    percent = f"test: error {100 * result['test_error_last']:.2f} % ({result['test_wrong_last']} of"
    from_run = scoring.describe(scoring.score(None, str(directory), None))
    assert percent in from_run
    assert "step 12" in from_run
    assert json.loads((directory / "evaluation.json").read_text())["test"]["examples"] == 359
    file = str(directory / "weights.safetensors")
    assert percent in scoring.describe(scoring.score(None, None, file))
    assert percent in scoring.describe(scoring.score(config, None, file))
    one = str(directory / "checkpoints" / "12")
    assert percent in scoring.describe(scoring.score(None, None, one))


def test_a_net_with_more_outputs_than_classes_is_scored(small_config, tmp_path):
    small_config.model.num_classes = 12
    small_config.train.total_steps = 1
    small_config.optim.boundaries_steps = (1,)
    result = train.train(small_config, tmp_path / "run")
    found = scoring.score(None, str(tmp_path / "run"), None)
    assert found["test"]["wrong"] == result["test_wrong_last"]
    assert len(found["test"]["confusion"]) == 12
    assert (tmp_path / "run/confusion.png").exists()


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
    small_config.train.total_steps = 1
    small_config.optim.learning_rate = 1e-12
    train.train(small_config, tmp_path / "run", str(file))
    tree, _ = final_tree(tmp_path / "run")
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8)  # noqa: E731
    jax.tree.map(close, tree["params"], loaded.variables["params"])


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
    train.train(small_config, tmp_path / "run", str(tmp_path / "w.safetensors"))
    tuned = weights.load(tmp_path / "run" / "weights.safetensors")
    np.testing.assert_array_equal(tuned.mean, changed.mean)
    np.testing.assert_array_equal(tuned.std, changed.std)
    assert tuned.variables["params"]["head"]["kernel"].shape == (64, 12)
    stem = [v["params"]["stem_conv"]["kernel"] for v in (tuned.variables, loaded.variables)]
    np.testing.assert_allclose(*stem, atol=1e-8)
    # Started again without the file, the run still knows.
    (tmp_path / "run" / "result.json").unlink()
    train.train(small_config, tmp_path / "run")
    again = weights.load(tmp_path / "run" / "weights.safetensors")
    np.testing.assert_array_equal(again.mean, changed.mean)
    # Without a checkpoint it needs the file.
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="began with the weights file with SHA-256"):
        train.train(small_config, tmp_path / "run")
    train.train(small_config, tmp_path / "run", str(tmp_path / "w.safetensors"))


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


def test_stopped_twice_before_the_first_step(small_config, tmp_path, monkeypatch):
    original = loop.Loop.run

    def signalled(self):
        self.stop_signal = signal.SIGTERM
        return original(self)

    monkeypatch.setattr(loop.Loop, "run", signalled)
    for _ in range(2):
        stopped = train.train(small_config, tmp_path / "run")
        assert stopped == {"stopped": 0, "signal": "SIGTERM"}


def test_many_steps_a_dispatch_change_nothing_but_rounding(small_config, tmp_path, monkeypatch):
    """The accelerators' way: chunks by `lax.scan`, the remainder step by step, two programs."""
    compiled = []
    original = loop.Loop.run

    def run_and_note(self):
        try:
            return original(self)
        finally:
            compiled.append(sorted(key[-1] for key in self.programs))

    monkeypatch.setattr(loop.Loop, "run", run_and_note)
    small_config.log.every_steps = 5
    small_config.eval.every_steps = 7
    small_config.checkpoint.every_steps = 6
    results = []
    for chunk in (1, 3):
        small_config.train.chunk_steps = chunk
        results.append(train.train(small_config, tmp_path / str(chunk)))
    assert compiled == [[1], [1, 3]]
    records = [metrics.read_records(tmp_path / n / "metrics.jsonl") for n in ("1", "3")]
    assert [(r["split"], r["step"]) for r in records[0]] == [
        (r["split"], r["step"]) for r in records[1]
    ]
    first = [r["loss"] for r in metrics.of_split(records[0], "train")][:1]
    np.testing.assert_allclose(
        first, [r["loss"] for r in metrics.of_split(records[1], "train")][:1], rtol=1e-3
    )
    assert all(r["images_per_second"] > 0 for r in metrics.of_split(records[1], "train"))
    assert results[1]["images_per_second"] > 0


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


def test_statistics_can_be_estimated_again_before_an_evaluation(small_config, tmp_path):
    small_config.eval.bn_examples = 256
    small_config.train.total_steps, small_config.optim.boundaries_steps = 4, ()
    result = train.train(small_config, tmp_path / "run")
    file = tmp_path / "run" / "weights.safetensors"
    assert scoring.score(None, None, str(file))["test"]["wrong"] == result["test_wrong_last"]
    # Early on, running statistics lag far behind: the estimates must make a difference.
    tree, _ = final_tree(tmp_path / "run")
    running, estimated = tree["batch_stats"], weights.load(file).variables["batch_stats"]
    gap = running["stem_bn"]["mean"] - estimated["stem_bn"]["mean"]
    assert np.abs(gap).max() > 1e-3


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


def test_every_option_is_as_safe_to_stop(small_config, tmp_path):
    c = small_config
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
    result = train.train(c, tmp_path / "whole")
    assert conftest.stop_at_step(c, tmp_path / "run", 5)["stopped"] == 5
    train.train(c, tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    losses = [r["loss"] for r in metrics.read_records(tmp_path / "run" / "metrics.jsonl")]
    assert np.isfinite(losses).all()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dtype"] == "bfloat16"
    file = tmp_path / "run" / "weights.safetensors"
    loaded = weights.load(file)
    assert loaded.model["survival"] == 0.4
    np.testing.assert_array_equal(loaded.std, [255])
    for source in (file, tmp_path / "run"):
        assert scoring.score(None, None, str(source))["test"]["wrong"] == result["test_wrong_last"]
