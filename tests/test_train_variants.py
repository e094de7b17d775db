"""Runs with Adam and stochastic depth: as safe to stop and to evaluate as the paper's."""

import signal
import time

import numpy as np
import pytest

from resnet_flax.runs import checkpoint, weights
from resnet_flax.training import loop, scoring, train
from tests.conftest import make_small_config
from tests.test_train import assert_same_end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = make_small_config()
    config.model.survival = 0.4
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-3
    config.optim.decay_factors = (0.5, 0.25)
    config.optim.decay_norm_and_bias = False
    config.data.fill = "edge"
    config.data.normalize = "pixel_mean_255"
    directory = tmp_path_factory.mktemp("variants") / "run"
    return config, directory, train.train(config, directory)


def test_stopped_it_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
    config, uninterrupted, _ = finished
    original = loop.Loop._train

    def train_then_signal(self):
        original(self)
        if self.step == 5:
            signal.raise_signal(signal.SIGTERM)
            while not self.stop_signal:  # Another thread answers.
                time.sleep(0.01)

    monkeypatch.setattr(loop.Loop, "_train", train_then_signal)
    assert train.train(config, tmp_path / "run") == {"stopped": 5, "signal": "SIGTERM"}
    monkeypatch.undo()
    train.train(config, tmp_path / "run")
    assert_same_end(tmp_path / "run", uninterrupted)
    assert checkpoint.steps_in(tmp_path / "run" / "checkpoints")[-1] == 12


def test_its_weights_say_how_blocks_are_scaled_at_test(finished):
    _, directory, result = finished
    file = directory / "weights.safetensors"
    loaded = weights.load(file)
    assert loaded.model["survival"] == 0.4
    np.testing.assert_array_equal(loaded.std, [255])
    percent = f"{100 * result['test_error_last']:.2f}"
    assert percent in scoring.score(None, None, str(file))
    assert percent in scoring.score(None, None, str(directory))
