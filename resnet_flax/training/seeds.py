"""Several seeds of one configuration in one process.

Each seed is an ordinary run in a directory of its own, `<workdir>/seed3`, `<workdir>/seed4`, …,
that can be stopped, resumed alone or with others, and evaluated. They share the process, the images
on the devices, and the compiled programs.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import data
from resnet_flax.data.dataset import Dataset, for_seed
from resnet_flax.devices import distributed, sharding
from resnet_flax.errors import UserError
from resnet_flax.training import inputs


def split(config: ConfigDict, directory: pathlib.Path) -> list[tuple[ConfigDict, pathlib.Path]]:
    """The configuration and the directory of each seed's run; one seed's are as given.

    Raises:
      UserError: several seeds do not go with the data set, or with several processes.
    """
    count = config.train.num_seeds
    if count == 1:
        return [(config, directory)]
    if config.data.name in data.STREAMED:
        raise UserError(
            f"config.train.num_seeds={count} needs a data set that lies on the devices, not "
            f"config.data.name={config.data.name}: train one seed at a time"
        )
    if distributed.count() > 1:
        raise UserError(
            f"config.train.num_seeds={count} is for one process: leave --distributed out, or train "
            "one seed"
        )
    runs = []
    for seed in range(config.seed, config.seed + count):
        one = config.copy_and_resolve_references()
        one.seed, one.train.num_seeds = seed, 1
        runs.append((one, directory / f"seed{seed}"))
    return runs


def load_data(configs: Sequence[ConfigDict]) -> list[Dataset]:
    """The data set of each run, see `inputs.load_data`; several share their images."""
    if len(configs) == 1:
        return [inputs.load_data(configs[0])]
    whole = configs[0].copy_and_resolve_references()
    whole.data.split = "all"
    dataset = inputs.load_data(whole)
    return [for_seed(dataset, c.data.split, c.seed) for c in configs]


def meshes(mesh: Mesh, count: int) -> list[Mesh]:
    """The devices of each of `count` nets.

    One device each if that uses all of `mesh` evenly, so that no device waits for another; else
    every net is split over all of them.
    """
    if count % mesh.size or mesh.size == 1:
        return [mesh] * count
    single = [sharding.make_mesh([device], 1) for device in np.ravel(mesh.devices)]
    return [single[i % mesh.size] for i in range(count)]


def programs(meshes: Sequence[Mesh]) -> list[list[int]]:
    """Which nets, by their positions in `meshes`, train in one program.

    On a GPU they are all nets of one mesh, as branches: one net alone leaves most of it idle.
    Elsewhere branches gain nothing, and each net has a program of its own.
    """
    by_mesh: dict[Mesh, list[int]] = {}
    for i, mesh in enumerate(meshes):
        by_mesh.setdefault(mesh, []).append(i)
    if sharding.platform(meshes[0]) == "gpu":
        return list(by_mesh.values())
    return [[i] for i in range(len(meshes))]
