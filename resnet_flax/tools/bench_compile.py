"""Compiles the training steps of a case of `tools.bench` for a device that is not here.

python -m resnet_flax.tools.bench_compile CASE TARGET FOLDER
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from resnet_flax.devices import sharding
from resnet_flax.errors import UserError, first_line
from resnet_flax.tools import bench_program, entry
from resnet_flax.tools.bench_measure import Case, make_setups
from resnet_flax.training import feed, setup
from resnet_flax.training.setup import Setup

TARGETS = {"h100": "gpu", "v5e": "tpu", "v6e": "tpu"}
"""Devices to compile for, and their platforms."""

# Slices of TPUs by the number of devices.
_SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def _devices(target: str, count: int) -> list[Any]:
    if TARGETS[target] == "tpu":
        if count not in _SLICES:
            known = ", ".join(map(str, _SLICES))
            raise UserError(f"--devices={count}: of {target} there can be {known}")
        slice_name = f"{target}:{_SLICES[count]}"
        return list(topologies.get_topology_desc(slice_name, platform="tpu").devices)[:count]
    facts, host = pathlib.Path(__file__).with_name(f"{target}.txtpb").read_text(), f"1x1x{count}"
    there = topologies.get_topology_desc(platform="cuda", target_config=facts, topology=host)
    return list(there.devices)


def lower(
    here: Setup, mesh: Mesh, platform: str, steps: int, batch_size: int, nets: int = 1
) -> jax.stages.Lowered:
    """A chunk of `steps` training steps of `batch_size` examples on the devices of `mesh`.

    `here` is the setup on a CPU, with any batch size. `platform` chooses the model, see
    `setup.make_model`. The chunk has a branch for each of several `nets`.
    """
    run = dataclasses.replace(here, mesh=mesh, model=setup.make_model(here.config, platform))

    def abstract(tree, where, *first_axes):
        def one(x):
            shape = (*first_axes, *x.shape[len(first_axes) :])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

        return jax.tree.map(one, tree)

    everywhere = sharding.replicated(mesh)
    state = abstract(run.abstract_state(), everywhere)
    resident = abstract(here.train_feed.resident, everywhere)
    batches = abstract(here.train_feed.chunk(0, 1), sharding.split(mesh, 1), steps, batch_size)
    # Pallas asks what it compiles for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        chunk = run.make_train_chunk(several=nets > 1)
        return chunk.lower([state] * nets, [resident] * nets, [batches] * nets)


def compile_chunk(case: Case, target: str, folder: str) -> dict[str, Any]:
    """What a chunk of training steps consists of on one of `TARGETS`, see `bench_program.count`.

    `folder` is where this process's XLA_FLAGS let XLA write its list of launches.
    """
    setups, platform = make_setups(dataclasses.replace(case, devices=1)), TARGETS[target]
    here, nets = setups[0], len(setups)
    if nets > 1 and platform != "gpu":
        raise UserError(f"on {target} each of several seeds has a program: leave train.num_seeds")
    steps = feed.chunk_steps(here.train_feed, here.config.train.chunk_steps, platform)
    try:
        mesh = sharding.make_mesh(_devices(target, case.devices), case.batch_size)
        lowered = lower(here, mesh, platform, steps, case.batch_size, nets)
        begin = time.perf_counter()
        compiled = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"{target}: {first_line(error)}") from error
    seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
    here.close()
    lists = pathlib.Path(folder).glob("*train_*.thunk_sequence_after_thunk_passes.txt")
    thunks = "".join(path.read_text() for path in lists)
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
        **bench_program.count(compiled.as_text(), thunks, platform, steps),
    }


def main(argv: list[str]) -> None:
    """Compiles the case."""
    case, target, folder = argv
    print(json.dumps(compile_chunk(Case(**json.loads(case)), target, folder)))


if __name__ == "__main__":
    entry.run(main)
