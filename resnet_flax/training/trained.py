"""From what a user names (run, checkpoint, weights file, published net) to a trained net."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import data, models
from resnet_flax.config import base_config, flatten, validate
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs import checkpoint, published, weights
from resnet_flax.runs.directory import Directory
from resnet_flax.runs.weights import Weights
from resnet_flax.training import inputs, setup
from resnet_flax.training.setup import Setup
from resnet_flax.training.state import abstract_variables


@dataclasses.dataclass(frozen=True)
class Source:
    """What a user named, read."""

    path: pathlib.Path  # As named.
    weights: Weights  # `training` holds "config", flat, and "steps".
    directory: Directory | None = None  # Of the run, None for a weights file.
    sha256: str | None = None  # Of the weights file, None for a checkpoint.


def read_weights(source: str | pathlib.Path) -> Source:
    """A weights file, the one of a finished run, or published weights."""
    file, sha256 = published.locate(source)
    path = pathlib.Path(source)
    directory = Directory(path) if path.is_dir() else None
    return Source(path, weights.load(file), directory, sha256)


def run_of(path: pathlib.Path) -> Directory:
    """The run's directory that `path` is, or that holds the checkpoint `path`."""
    directory = Directory(path.resolve().parent.parent if _is_checkpoint(path) else path)
    if not directory.config:
        raise UserError(f"{path} holds no config.json: give --config, or a run's directory")
    return directory


def _is_checkpoint(path: pathlib.Path) -> bool:
    return path.name.isdigit() and path.resolve().parent.name == "checkpoints"


def read_checkpoint(path: pathlib.Path, warn: Callable[[str], None]) -> Weights:
    """A checkpoint, or the newest one of a run's directory; jax's devices must be counted."""
    directory = run_of(path)
    if _is_checkpoint(path):
        step, (tree, _) = int(path.name), checkpoint.read(path)
    else:
        found = checkpoint.read_newest(directory.checkpoints(), warn, set_aside=False)
        if found is None:
            raise UserError(f"{path} holds no checkpoints")
        step, tree, _ = found
    # Averaged weights are what was evaluated.
    variables = tree["ema"] if "ema" in tree else {k: tree[k] for k in ("params", "batch_stats")}
    mean, std = directory.preprocessing()
    names = tuple(directory.record.get("data", {}).get("class_names", ()))
    model = directory.model | {"shortcut": directory.record["shortcut"]}
    model["num_classes"] = model.get("num_classes") or len(names)
    return Weights(model, variables, mean, std, names, {"config": directory.config, "steps": step})


def own_config(directory: Directory | None, loaded: Weights | None) -> ConfigDict:
    """The configuration that a run, or a weights file without one, holds."""
    stored = directory.config if directory else loaded.training.get("config")
    stored = dict(stored) if isinstance(stored, dict) else {}
    if directory is None:
        # Where the data lay on the machine that made the file does not matter here.
        for key in ("data.data_dir", "data.archive", "data.mirror"):
            stored.pop(key, None)
    if loaded is not None:
        stored |= {f"model.{key}": value for key, value in loaded.model.items()}
    return unflatten(stored)


def unflatten(flat: Mapping[str, Any]) -> ConfigDict:
    """A configuration with the values of a flat one, as JSON gives them.

    Unknown keys are left out; missing ones stand at their defaults.
    """
    config = base_config()
    for key in flatten(config):
        if key in flat:
            value = flat[key]
            section, _, name = key.rpartition(".")
            target = config[section] if section else config
            with target.ignore_type():  # `validate` names what is wrong.
                target[name] = tuple(value) if isinstance(value, list) else value
    return config


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained net with its data."""

    source: pathlib.Path  # As named.
    sha256: str | None  # Of the weights file, None for a checkpoint.
    weights: Weights  # The outputs in the order of the data set's classes.
    run: Setup

    def variables(self, scanned: bool = False) -> dict[str, Any]:
        """`{"params": …, "batch_stats": …}` on all devices, in the canonical layout."""
        template = abstract_variables(self.run.model)
        fitted = weights.fit(self.weights.variables, template, str(self.source))
        fitted = layout.to_scanned(fitted) if scanned else fitted
        return sharding.put_tree(fitted, sharding.replicated(self.run.mesh))


def build(
    source: Source, config: ConfigDict, dataset: Dataset, mesh: Mesh, warn: Callable[[str], None]
) -> Trained:
    """A trained net with the data set of `config`; a `UserError` if they do not go together."""
    name, loaded = str(source.path), source.weights
    weights.check_preprocessing(loaded.mean, loaded.std, dataset.train.image_shape, name)
    built = setup.build(config, dataset, mesh, (loaded.mean, loaded.std), warn)
    weights.check_model(loaded, built.describe_model(), name)
    loaded = weights.for_classes(loaded, dataset.class_names, name)
    return Trained(source.path, source.sha256, loaded, built)


class Loader:
    """Loads nets one after the other, for the same devices, each data set once."""

    def __init__(self, data_dir: str | None = None):
        """`data_dir` replaces the one where the run found its data."""
        self._data_dir = data_dir
        self._mesh: Mesh | None = None
        self._datasets: dict[Any, Dataset] = {}

    def load(self, source: pathlib.Path) -> Trained:
        """Loads the net of a finished run's directory, a weights file, or a published name.

        Raises:
          UserError: it is none of these, or damaged, or its data are missing or not the same.
        """
        found = read_weights(source)
        config = own_config(found.directory, found.weights)
        if self._data_dir:
            config.data.data_dir = self._data_dir
        validate(config)
        models.resolve_shortcut(config.model.name, config.model.shortcut)
        self._mesh = self._mesh or hardware.choose_mesh(config)
        dataset = self._load_data(config)
        if found.directory:
            found.directory.check_data(dataset.name, dataset.fingerprint)
        return build(found, config, dataset, self._mesh, print)

    def _load_data(self, config: ConfigDict) -> Dataset:
        geometry = inputs.make_geometry(config) if config.data.name in data.STREAMED else None
        key = config.data.name, config.data.data_dir, config.data.split, config.seed, geometry
        if key not in self._datasets:
            self._datasets[key] = inputs.load_data(config)
        return self._datasets[key]
