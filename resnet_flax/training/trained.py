"""A trained net together with its data: from a finished run or from a weights file."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import data, models, pretrained
from resnet_flax.config import validate
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import hardware, sharding
from resnet_flax.runs import identity, record, weights
from resnet_flax.training import experiment, feed, inputs, scoring
from resnet_flax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained net.

    Attributes:
      source: what was asked for: a run's directory, a weights file, or a published name.
      file: the weights file.
      sha256: of it.
      weights: its content.
      run: the experiment.
    """

    source: pathlib.Path
    file: pathlib.Path
    sha256: str
    weights: weights.Weights
    run: Experiment

    def test_feed(self) -> feed.Feed:
        """The test examples."""
        return self.run.eval_feeds["test"]

    def variables(self) -> Any:
        """`{"params": …, "batch_stats": …}` on all devices, in the canonical layout."""
        template = self.run.abstract_variables()
        fitted = weights.fit(self.weights.variables, template, str(self.file))
        return sharding.put_tree(fitted, sharding.replicated(self.run.mesh))


class Loader:
    """Loads nets one after the other, for the same devices, each data set once."""

    def __init__(self, data_dir: str | None = None, warn: Callable[[str], None] = print):
        """Loads nothing yet.

        Args:
          data_dir: where the data are; None: where the run found them, or the default.
          warn: told of images that cannot be read.
        """
        self._data_dir, self._warn = data_dir, warn
        self._mesh: Mesh | None = None
        self._datasets: dict[Any, Dataset] = {}

    def load(self, source: pathlib.Path) -> Trained:
        """Loads a net.

        Args:
          source: the directory of a finished run, a weights file, or the name of published weights.

        Raises:
          UserError: it is neither, or damaged, or its data are not there or not the same.
        """
        file, sha256 = pretrained.locate(source)
        is_run = source.is_dir()
        loaded = weights.load(file)
        config = scoring.own_config(source, None if is_run else loaded)
        stored = {f"model.{key}": value for key, value in loaded.model.items()}
        scoring.fill(config, stored)
        if self._data_dir:
            config.data.data_dir = self._data_dir
        validate(config)
        models.resolve_shortcut(config.model.name, config.model.shortcut)
        self._mesh = self._mesh or hardware.choose_mesh(config)
        dataset = self._load_data(config)
        if is_run:
            identity.check_same_data(source, dataset)
        weights.check_preprocessing(loaded.mean, loaded.std, dataset.train.image_shape, str(source))
        loaded = weights.for_classes(loaded, dataset.class_names, str(source))
        preprocessing = loaded.mean, loaded.std
        run = experiment.build(config, dataset, self._mesh, preprocessing, self._warn)
        weights.check_model(loaded, record.describe_model(run), str(source))
        return Trained(source, file, sha256, loaded, run)

    def _load_data(self, config: ConfigDict) -> Dataset:
        geometry = inputs.make_geometry(config) if config.data.name in data.STREAMED else None
        key = config.data.name, config.data.data_dir, config.data.split, config.seed, geometry
        if key not in self._datasets:
            self._datasets[key] = inputs.load_data(config)
        return self._datasets[key]
