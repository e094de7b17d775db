"""Devices as a mesh with one axis, `data`: batches are split over it, all else is replicated."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.errors import UserError

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device], batch_size: int) -> Mesh:
    """A one-axis mesh over `devices`.

    Raises:
      UserError: their number does not divide `batch_size`.
    """
    if batch_size % len(devices):
        raise UserError(
            f"config.data.batch_size={batch_size} is not divisible by the {len(devices)} "
            f"{devices[0].platform} devices"
        )
    # Explicit axes, today's default of jax.make_mesh, refuse an ordinary linen + optax step.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def platform(mesh: Mesh) -> str:
    """What the devices are: "cpu", "gpu" or "tpu"; they need not be here."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis number `axis` split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every process, placed under `sharding`."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_tree(tree: Any, sharding: NamedSharding) -> Any:
    """Every host array of a tree, the same on every process, placed under `sharding`."""
    # device_put would compare them over the network, and may alias what is then donated.
    return jax.tree.map(lambda value: put(np.array(value), sharding), tree)


def rows_here(sharding: NamedSharding, axis: int, size: int) -> np.ndarray:
    """Positions along `axis`, of length `size`, that this process's devices hold: int64, rising."""
    shape = (1,) * axis + (size,)
    places = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([np.arange(size)[place[axis]] for place in places]))


def put_rows(
    value: np.ndarray, rows: np.ndarray, batch_size: int, sharding: NamedSharding
) -> jax.Array:
    """Places a batch of which each process has its own part.

    Args:
      value: [k, R, …], the positions `rows` of the second axis.
      rows: from `rows_here`.
      batch_size: length of the whole second axis.
      sharding: of it.

    Returns:
      [k, batch_size, …]
    """
    shape = (len(value), batch_size, *value.shape[2:])

    def part(index):
        first, last, _ = index[1].indices(batch_size)
        begin = int(np.searchsorted(rows, first))
        return value[:, begin : begin + last - first]

    return jax.make_array_from_callback(shape, sharding, part)
