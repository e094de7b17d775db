"""The devices of a run, of all its processes, and what fits on them."""

import contextlib
import functools
import json
import os
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax.config import flatten
from resnet_flax.devices import cpu, distributed, sharding
from resnet_flax.errors import UserError

# What XLA leaves to its YNNPACK kernels: its default, convolutions and products, and elementwise
# chains and reductions.
_LIBRARY_FUSIONS = "INDIVIDUAL_CONVOLUTION", "INDIVIDUAL_DOT", "ELTWISE", "REDUCE"

# What may be part of a CUDA graph. With all of these a training step is one graph; by default it is
# many, and its convolutions are launched one by one.
_GRAPH_PARTS = (
    "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,CONVOLUTION"
)

_COMPILER_OPTIONS = {
    "cpu": {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(
            f"LIBRARY_FUSION_TYPE_{kind}" for kind in _LIBRARY_FUSIONS
        )
    },
    "gpu": {"xla_gpu_enable_command_buffer": _GRAPH_PARTS},
}


# Branches of one program side by side, not one after the other.
_CONCURRENT = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


def compiler_options(platform: str, *, concurrent: bool = False) -> dict[str, str] | None:
    """Options of `jax.jit` for a training step on "cpu", "gpu" or "tpu", None for none.

    Options that this version of XLA lacks are left out.

    Args:
      platform: of the devices.
      concurrent: whether the program trains several nets as independent branches.
    """
    options = dict(_COMPILER_OPTIONS.get(platform, {}))
    if concurrent and platform == "gpu":
        options |= _CONCURRENT
    return {k: v for k, v in options.items() if _is_known(k, v)} or None


@functools.cache
def _is_known(option: str, value: str) -> bool:
    try:
        # Every backend parses the options of all, so that the platform's own need not be here.
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except Exception:
        return False
    return True


def choose_mesh(config: ConfigDict) -> Mesh:
    """The devices to run on; a CPU is first split into several where that pays.

    Call it before anything else touches jax's devices, which are counted once per process. Of
    several processes all must call it.

    Raises:
      UserError: there are too few devices, they do not divide the batch, or the processes have
        been given different configurations.
    """
    here = {"config": json.dumps(flatten(config)), "jax": jax.__version__, **cpu.describe_cores()}
    everywhere = distributed.gather(here)
    _check_same(everywhere)
    requested = config.train.cpu_devices
    count = cpu.choose_devices(
        requested,
        config.data.batch_size,
        config.model.bn_group_size,
        cores=cpu.cores_per_process(everywhere),
        processes=len(everywhere),
    )
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Where jax has counted its devices already, as in a notebook, what it has must do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if devices[0].platform == "cpu":
        if requested > jax.local_device_count():
            raise UserError(
                f"config.train.cpu_devices={requested}, but jax already runs with "
                f"{jax.local_device_count()} devices in this process"
            )
        processes = range(jax.process_count())
        each = [[d for d in devices if d.process_index == p][:count] for p in processes]
        devices = [d for own in each for d in own]
    return sharding.make_mesh(devices, config.data.batch_size)


def why_none() -> str | None:
    """Why jax has no devices, where it has none: JAX_PLATFORMS may name some that are not here."""
    try:
        jax.devices()
    except Exception:  # Of any kind: plugins fail in their own ways.
        return (
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: jax finds no such devices here; "
            "unset it, or set JAX_PLATFORMS=cpu"
        )
    return None


def check_memory(compiled: jax.stages.Compiled, batch_size: int) -> None:
    """Raises UserError where this process's devices have too little memory for a training step.

    Args:
      compiled: the step.
      batch_size: for the message.
    """
    if jax.default_backend() == "cpu":
        there_is = cpu.memory_bytes()
    else:
        there_is = sum((d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices())
    m = compiled.memory_analysis()
    each = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    needed = (each - m.alias_size_in_bytes) * jax.local_device_count()
    if there_is and needed > there_is:
        raise UserError(
            f"a training step needs {needed / 1e9:.1f} GB of memory, and there are "
            f"{there_is / 1e9:.1f} GB: lower config.data.batch_size={batch_size}, or set "
            "config.model.remat=True"
        )


def _check_same(everywhere: list[dict[str, Any]]) -> None:
    first = everywhere[0]
    ours = json.loads(first["config"])
    for index, other in enumerate(everywhere):
        if other["jax"] != first["jax"]:
            raise UserError(
                f"process {index} runs jax {other['jax']}, process 0 jax {first['jax']}: install "
                "the same version on all machines"
            )
        theirs = json.loads(other["config"])
        for key in ours:
            # Paths are each machine's own matter.
            local = key in ("data.data_dir", "data.archive", "data.mirror")
            if ours[key] != theirs[key] and not local:
                raise UserError(
                    f"process {index} was started with --config.{key}={theirs[key]}, process 0 "
                    f"with {ours[key]}: give all the same flags"
                )
