"""What `tools.bench` measures or compiles: a configuration and noise for data."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import base_config, imagenet_config, override, validate
from resnet_flax.data.dataset import Dataset, Split
from resnet_flax.data.streaming import StreamedSplit
from resnet_flax.devices import hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.training import feed, seeds, setup
from resnet_flax.training.setup import Setup

PARTS = "train", "eval", "ceiling"
"""What can be measured; "ceiling" is the rate of a product of large matrices."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure."""

    model: str
    batch_size: int  # examples a step, over all devices; 0: the recipe's
    dtype: str = "auto"
    devices: int = 0  # 0: as many as a run would use
    repeats: int = 5  # timings of each thing
    seconds: float = 2.0  # shortest timing
    examples: int = 0  # 0: 50,000, or two batches of ImageNet's size
    parts: Sequence[str] = PARTS
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the config


def make_config(case: Case) -> ConfigDict:
    """The case's configuration, by the paper's recipe for the model's data set."""
    large = models.get_architecture(case.model).image_size > 32
    config = imagenet_config() if large else base_config()
    config.model.name, config.model.dtype = case.model, case.dtype
    config.data.batch_size = case.batch_size or config.data.batch_size
    config.data.workers, config.train.cpu_devices = 0, case.devices
    # The labels are noise: a model that diverges on them would be timed on infinities.
    config.optim.learning_rate = 1e-3
    override(config, case.overrides)
    validate(config)
    return config


class _Decoded(StreamedSplit):
    def example(self, index, random):
        return self.source.images[index], self.source.labels[index]


def _noise(case: Case, batch_size: int, most_tests: int) -> Dataset:
    """Training examples, and the first of them to test.

    Images of CIFAR's size lie on the devices. Larger ones are streamed, but need no decoding.
    """
    architecture = models.get_architecture(case.model)
    side, classes = architecture.image_size, architecture.num_classes
    is_resident = side == 32
    size = case.examples or (50_000 if is_resident else 2 * batch_size)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, side, side, 3), np.uint8)
    labels = random.integers(0, classes, size, np.int32)
    train, test = Split(images, labels), Split(images[:most_tests], labels[:most_tests])
    if not is_resident:
        train, test = (
            _Decoded(split, np.arange(len(split)), side, (side, side), central)
            for split, central in ((train, False), (test, True))
        )
    return Dataset("noise", train, None, test, tuple(map(str, range(classes))), "", None)


def make_setups(case: Case) -> list[Setup]:
    """The case's setup on noise, one for each seed (`train.num_seeds`).

    Raises:
      UserError: there are not as many devices.
    """
    config = make_config(case)
    mesh = hardware.choose_mesh(config)
    if case.devices > mesh.size:
        raise UserError(f"--devices={case.devices}, but there are {mesh.size}")
    if case.devices:
        mesh = sharding.make_mesh(mesh.devices.flat[: case.devices], config.data.batch_size)
    most_tests = 2_000 if sharding.platform(mesh) == "cpu" else 10_000
    data = _noise(case, config.data.batch_size, most_tests)
    configs = [one for one, _ in seeds.split(config, pathlib.Path())]
    put, meshes = feed.put_once(), seeds.meshes(mesh, len(configs))
    return [setup.build(c, data, m, put=put) for c, m in zip(configs, meshes, strict=True)]
