"""The devices of all processes of a run, their compiler options, and their memory."""

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

_COMPILER_OPTIONS = {
    "cpu": {
        # What XLA leaves to YNNPACK: convolutions and products by default; here also elementwise
        # chains and reductions.
        "xla_cpu_experimental_ynn_fusion_type": (
            "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
            "LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE"
        )
    },
    "gpu": {
        # What may be part of a CUDA graph. With all of these a training step is one graph; by
        # default it is many, and its convolutions are launched one by one.
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,CONVOLUTION"
        )
    },
}


# Paths that may differ from machine to machine.
_LOCAL_KEYS = {"data.data_dir", "data.archive", "data.mirror"}


def compiler_options(platform: str, *, concurrent: bool = False) -> dict[str, str] | None:
    """Options of `jax.jit` for a training step, None for none; unknown ones are left out.

    Args:
      platform: "cpu", "gpu" or "tpu".
      concurrent: whether the program trains several nets as independent branches.
    """
    options = dict(_COMPILER_OPTIONS.get(platform, {}))
    if concurrent and platform == "gpu":
        options["xla_gpu_command_buffer_scheduling_mode"] = "CONCURRENT"
    return {k: v for k, v in options.items() if _is_known(k, v)} or None


@functools.cache
def _is_known(option: str, value: str) -> bool:
    try:
        # Every backend parses the options of all platforms.
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except Exception:
        return False
    return True


def choose_mesh(config: ConfigDict) -> Mesh:
    """The devices to run on; a CPU is first split into several where that pays.

    All processes must call it, before anything else touches jax's devices.

    Raises:
      UserError: there are too few devices, they do not divide the batch, or the processes have
        different configurations.
    """
    here = {"config": json.dumps(flatten(config)), "jax": jax.__version__, **cpu.describe_cores()}
    everywhere = distributed.gather(here)
    _check_same(everywhere)
    requested, batch_size = config.train.cpu_devices, config.data.batch_size
    cores, processes = cpu.cores_per_process(everywhere), len(everywhere)
    count = requested or cpu.choose_devices(
        batch_size, config.model.bn_group_size, cores=cores, processes=processes
    )
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Too late where jax has counted its devices, as in a notebook.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if devices[0].platform == "cpu":
        if requested > jax.local_device_count():
            raise UserError(
                f"config.train.cpu_devices={requested}, but jax already runs with "
                f"{jax.local_device_count()} devices in this process"
            )
        devices = [d for i in range(processes) for d in jax.local_devices(i)[:count]]
    return sharding.make_mesh(devices, batch_size)


def why_none() -> str | None:
    """Says that JAX_PLATFORMS names devices that are not here, where jax has none at all."""
    try:
        jax.devices()
    except Exception:  # Each plugin fails in its own way.
        return (
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: jax finds no such devices here; "
            "unset it, or set JAX_PLATFORMS=cpu"
        )
    return None


def check_memory(compiled: jax.stages.Compiled, batch_size: int) -> None:
    """Raises UserError where this process's devices have too little memory for a training step."""
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
    jax_version, first = everywhere[0]["jax"], json.loads(everywhere[0]["config"])
    for index, other in enumerate(everywhere):
        if other["jax"] != jax_version:
            raise UserError(
                f"process {index} runs jax {other['jax']}, process 0 jax {jax_version}: install "
                "the same version on all machines"
            )
        for key, value in json.loads(other["config"]).items():
            if value != first[key] and key not in _LOCAL_KEYS:
                raise UserError(
                    f"process {index} was started with --config.{key}={value}, process 0 "
                    f"with {first[key]}: give all the same flags"
                )
