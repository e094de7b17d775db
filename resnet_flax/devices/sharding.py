"""Devices as a mesh with one axis, `data`: batches are split over it, the rest is replicated."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.errors import UserError

AXIS = "data"


def make_mesh(devices: Sequence[jax.Device], batch_size: int) -> Mesh:
    """A one-axis mesh; UserError if the number of devices does not divide `batch_size`."""
    if batch_size % len(devices):
        raise UserError(
            f"config.data.batch_size={batch_size} is not divisible by the {len(devices)} "
            f"{devices[0].platform} devices"
        )
    # Explicit axes, today's default of jax.make_mesh, refuse an ordinary linen + optax step.
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def platform(mesh: Mesh) -> str:
    """One of "cpu", "gpu" and "tpu"; the devices need not be present."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis `axis` split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places a host array that is the same on every process."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_tree(tree: Any, sharding: NamedSharding) -> Any:
    """Places a tree of host arrays that are the same on every process."""
    # device_put would compare them over the network, and may alias what is then donated.
    return jax.tree.map(lambda value: put(np.array(value), sharding), tree)


def rows_here(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that this process's devices hold: int64, ascending."""
    places = split(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for (place,) in places]))


def put_rows(mesh: Mesh, batches: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Places k batches of which each process has the rows `rows_here`: [k, R, ...] to [k, B, ...].

    The second axis is split over the devices.
    """
    here = len(mesh.local_devices)
    shapes = {
        name: (len(value), value.shape[1] // here * mesh.size, *value.shape[2:])
        for name, value in batches.items()
    }
    return jax.make_array_from_process_local_data(split(mesh, 1), batches, shapes)
