"""Devices as a mesh with one axis, `data`: batches are split over it, all else is replicated."""

from collections.abc import Sequence

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


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis number `axis` split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array, the same on every process, placed under `sharding`."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
