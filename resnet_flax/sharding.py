"""Devices as a mesh with one axis, `data`: batches are split over it, all else is replicated."""

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.errors import UserError

AXIS = "data"
# Fewer images than this on each core's device cost more in dispatch than the core gains.
_MIN_EXAMPLES_PER_CPU_DEVICE = 16


def choose_cpu_devices(requested: int, batch_size: int, bn_group_size: int) -> int:
    """How many devices to split a CPU into; has no meaning on other platforms.

    Args:
      requested: the number wanted; 0: as many as there are usable cores, at most, that divide the
        batch (and its batch-norm groups) evenly and leave each at least 16 examples.
      batch_size: examples per step.
      bn_group_size: examples per batch-norm group, 0 for the whole batch.
    """
    if requested:
        return requested
    units = batch_size // (bn_group_size or 1)
    # A container or a job may own fewer cores than the machine has; macOS cannot tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = min(cores or 1, batch_size // _MIN_EXAMPLES_PER_CPU_DEVICE)
    return max((n for n in range(1, most + 1) if units % n == 0), default=1)


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
