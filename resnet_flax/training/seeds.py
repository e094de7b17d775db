"""Several seeds of one configuration as one program.

Where their number is a multiple of the devices, each device trains whole nets and none waits for
another; else the nets lie on all devices, and every net's batch is split over them. On a CPU the
nets of a device follow one another inside the program, elsewhere they are one vectorised
computation (`jax.vmap`). On a GPU that is slower than one net after the other, as was measured
since: results/performance.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from resnet_flax import data
from resnet_flax.data.dataset import Dataset, for_seed
from resnet_flax.devices import distributed, sharding
from resnet_flax.errors import UserError
from resnet_flax.models.resnet import ResNet
from resnet_flax.training import experiment, feed, inputs, state
from resnet_flax.training.experiment import Experiment

# What the nets of a program share of `resident`, see `steps`.
_SHARED = ("images", "labels")


def member_configs(config: ConfigDict) -> list[ConfigDict]:
    """The configuration of each seed's run: `config` itself where `train.num_seeds` is 1.

    Raises:
      UserError: several seeds do not go with the rest of the configuration, or of the program.
    """
    count = config.train.num_seeds
    if count == 1:
        return [config]
    said = f"config.train.num_seeds={count}"
    if config.data.name in data.STREAMED:
        raise UserError(
            f"{said} needs a data set that lies on the devices, not config.data.name="
            f"{config.data.name}: train one seed at a time"
        )
    if distributed.count() > 1:
        raise UserError(f"{said} is for one process: leave --distributed out, or train one seed")
    configs = []
    for seed in range(config.seed, config.seed + count):
        one = config.copy_and_resolve_references()
        one.seed, one.train.num_seeds = seed, 1
        configs.append(one)
    return configs


def load_data(configs: Sequence[ConfigDict]) -> list[Dataset]:
    """The data set of each of `member_configs`; their images are the same arrays.

    Raises:
      UserError: see `inputs.load_data`.
    """
    whole = configs[0].copy_and_resolve_references()
    whole.data.split = "all"
    dataset = inputs.load_data(whole)
    return [for_seed(dataset, c.data.split, c.seed) for c in configs]


def build(
    configs: Sequence[ConfigDict],
    datasets: Sequence[Dataset],
    mesh: Mesh,
    preprocessing: Sequence[tuple[np.ndarray, np.ndarray] | None] | None = None,
    warn: Callable[[str], None] = print,
) -> "Group":
    """Puts the experiments of several seeds together.

    Args:
      configs: from `member_configs`.
      datasets: from `load_data`.
      mesh: of all devices.
      preprocessing: of each seed, see `experiment.build`.
      warn: likewise.

    Raises:
      UserError: see `experiment.build`.
    """
    put, known = feed.put_once(), {}
    members = []
    for config, dataset, given in zip(
        configs, datasets, preprocessing or [None] * len(configs), strict=True
    ):
        if given is None:
            if id(dataset) not in known:
                known[id(dataset)] = inputs.statistics(dataset, config.data.normalize)
            given = known[id(dataset)]
        members.append(experiment.build(config, dataset, mesh, given, warn, put))
    return Group(tuple(members))


class SeedsFeed:
    """Feeds several nets at once: each its own positions in one data set on the devices.

    `resident` is as for one net, see `steps`, with a first axis of N nets in all but the images and
    labels.
    """

    default_chunk = feed.ResidentFeed.default_chunk

    def __init__(
        self, feeds: Sequence[feed.ResidentFeed], by_net: NamedSharding, by_batch: NamedSharding
    ):
        """Stacks what the nets do not share.

        Args:
          feeds: of the nets; their images and labels are the same arrays, see `feed.put_once`.
          by_net: of a first axis of nets.
          by_batch: of positions [k, N, B].
        """
        self._feeds, self._by_batch = feeds, by_batch
        own = [{k: v for k, v in f.resident.items() if k not in _SHARED} for f in feeds]
        stack = jax.jit(lambda x: jax.tree.map(lambda *y: jnp.stack(y), *x), out_shardings=by_net)
        self.resident = stack(own) | {name: feeds[0].resident[name] for name in _SHARED}

    def chunk(self, step: int, count: int) -> jax.Array:
        """Positions of the examples of `count` steps: int32 [count, N, B]."""
        index = np.stack([f.positions(step, count) for f in self._feeds], axis=1)
        return sharding.put(index, self._by_batch)

    def close(self) -> None:
        """Nothing to end."""


@dataclasses.dataclass(frozen=True)
class Group:
    """What `experiment.Experiment` is for one run, for several that differ in the seed only.

    A state has a first axis of nets in each leaf.

    Attributes:
      members: the runs, at least two.
    """

    members: tuple[Experiment, ...]

    @property
    def config(self) -> ConfigDict:
        """What holds for all of them: everything but the seed."""
        return self.members[0].config

    @property
    def dataset(self) -> Dataset:
        """The first seed's."""
        return self.members[0].dataset

    @property
    def mesh(self) -> Mesh:
        """Of all devices."""
        return self.members[0].mesh

    @property
    def model(self) -> ResNet:
        """The net."""
        return self.members[0].model

    @property
    def has_whole_nets(self) -> bool:
        """Whether each device trains nets of its own."""
        return len(self.members) % self.mesh.size == 0

    @property
    def _by_net(self) -> NamedSharding:
        """Of a first axis of nets."""
        whole = self.has_whole_nets
        return sharding.split(self.mesh) if whole else sharding.replicated(self.mesh)

    @functools.cached_property
    def train_feed(self) -> SeedsFeed:
        """The training examples."""
        by_batch = sharding.split(self.mesh, 1 if self.has_whole_nets else 2)
        return SeedsFeed([m.train_feed for m in self.members], self._by_net, by_batch)

    def create_state(self, variables: Sequence[Any] | None = None) -> state.TrainState:
        """The first states, from the canonical `variables` of each or from the seeds."""
        if variables is not None:
            return self.place([m.create_state(v) for m, v in self._pairs(variables)])
        seeds = np.array([m.config.seed for m in self.members], np.int32)

        def create(seeds):
            return jax.vmap(lambda seed: self.members[0].first_state(seed, None))(seeds)

        return state.place(create, self._by_net, seeds)

    def _pairs(self, values: Sequence[Any]):
        return zip(self.members, values, strict=True)

    def place(self, states: Sequence[state.TrainState]) -> state.TrainState:
        """Puts the states of all nets where training keeps them."""
        stacked = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(list(states)))
        return sharding.put_tree(stacked, self._by_net)

    def host_states(self, state: state.TrainState) -> list[state.TrainState]:
        """The inverse of `place`: each net's state, on the host."""
        host = jax.device_get(state)
        return [jax.tree.map(lambda x, i=i: x[i], host) for i in range(len(self.members))]

    @functools.cached_property
    def _take(self):
        return jax.jit(
            lambda tree, i: jax.tree.map(lambda x: x[i], tree),
            out_shardings=sharding.replicated(self.mesh),
        )

    def evaluated(self, state: state.TrainState, member: int) -> Any:
        """The variables of one net that are evaluated, on all devices."""
        return self._take(state.evaluated(), np.int32(member))

    def make_evaluated(self):
        """See `Experiment.make_evaluated`; to be given the member."""
        return self.members[0].make_evaluated()

    def make_scorer(self):
        """See `Experiment.make_scorer`; to be given the member."""
        return self.members[0].make_scorer()

    def make_train_chunk(self):
        """See `steps.make_train_chunk`; everything has an axis of nets, after that of steps."""
        first, everywhere = self.members[0], sharding.replicated(self.mesh)
        return first.make_train_chunk(
            sharding=None if self.has_whole_nets else sharding.split(self.mesh, 0),
            together=self._together,
            out_shardings=(self._by_net, everywhere),
        )

    def _together(self, train_step: Callable) -> Callable:
        # A CPU gains nothing from several nets in one operation, and its caches hold one better.
        one_by_one = sharding.platform(self.mesh) == "cpu"

        def steps(states, batches, resident):
            shared = {name: resident[name] for name in _SHARED}
            own = {k: v for k, v in resident.items() if k not in _SHARED}

            def step(state, batch, own):
                return train_step(state, batch, shared | own)

            if not one_by_one:
                return jax.vmap(step)(states, batches, own)
            if len(jax.tree.leaves(batches)[0]) > 1:
                return jax.lax.map(lambda net: step(*net), (states, batches, own))
            alone = step(*jax.tree.map(lambda x: x[0], (states, batches, own)))
            return jax.tree.map(lambda x: x[None], alone)

        if not self.has_whole_nets:
            return steps
        by_net, everywhere = PartitionSpec(sharding.AXIS), PartitionSpec()
        names = self.train_feed.resident
        resident = {name: everywhere if name in _SHARED else by_net for name in names}
        # Nothing is exchanged, so there is nothing that the checks of replication could find.
        return jax.shard_map(
            steps,
            mesh=self.mesh,
            in_specs=(by_net, by_net, resident),
            out_specs=by_net,
            check_vma=False,
        )

    def close(self) -> None:
        """Ends what works in the background."""
        for member in self.members:
            member.close()
