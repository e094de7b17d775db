"""Compiles the training chunk of a case of `tools.bench` for devices that are not there.

python -m resnet_flax.tools.bench_offline JSON   (a `bench_worker.Case`, "target" and "folder")

The compilers are those of a real run, and so is the program: that of `bench_worker`, but for the
devices. Nothing is executed. One process compiles one case: where XLA is to write its list of
launches it reads once, from the environment.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.tools import bench_program, bench_report, bench_worker, entry
from resnet_flax.training import feed, setup

TARGETS = {"h100": "gpu", "v5e": "tpu", "v6e": "tpu"}
"""What can be compiled for, and the platform of each."""

KEYS = (
    "model target devices launches host_submissions cycles_per_step cycles_per_chunk "
    "argument_bytes temporary_bytes all_reduces compile_seconds"
).split()
"""Of a row; None where there is no such number. With `error` where it could not be had."""

_COMPILERS = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}
_SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_THUNKS = "*train_chunk*.thunk_sequence_after_thunk_passes.txt"

_COLUMNS: list[bench_report.Column] = [
    ("net", lambda r: r["model"]),
    ("batch", lambda r: str(r["batch_size"])),
    ("dtype", lambda r: r["dtype"]),
    ("for", lambda r: f"{r['devices']} x {r['target']}"),
    ("launches/step", lambda r: f"{r['launches']:,}"),
    ("from the host", lambda r: f"{r['host_submissions']:,}"),
    ("cycles/step", lambda r: f"{r['cycles_per_step']:,}"),
    ("cycles/chunk", lambda r: f"{r['cycles_per_chunk']:,}"),
    ("all-reduces/step", lambda r: f"{r['all_reduces']:,}"),
    ("arguments MB", lambda r: f"{r['argument_bytes'] / 1e6:,.0f}"),
    ("temporary MB", lambda r: f"{r['temporary_bytes'] / 1e6:,.0f}"),
    ("compile s", lambda r: f"{r['compile_seconds']:.0f}"),
]


def check(target: str, counts: Sequence[int]) -> None:
    """Refuses what cannot be compiled here.

    Args:
      target: of `TARGETS`.
      counts: numbers of devices.

    Raises:
      UserError: no such target, no compiler for it, or no such number of its devices.
    """
    if target not in TARGETS:
        raise UserError(f"--compile_for={target} must be one of {', '.join(TARGETS)}")
    platform = TARGETS[target]
    if not any(map(importlib.util.find_spec, _COMPILERS[platform])):
        raise UserError(
            f"--compile_for={target} needs XLA's compiler for {platform.upper()}s: "
            f"pip install '.[offline_{platform}]'"
        )
    for count in counts:
        if platform == "tpu" and count not in _SLICES:
            known = ", ".join(map(str, _SLICES))
            raise UserError(f"--devices={count}: of {target} there can be {known}")


def environment(target: str, folder: str) -> dict[str, str]:
    """Variables of a process that compiles for `target`; XLA writes its launches to `folder`."""
    variables = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if TARGETS[target] == "tpu":
        return variables | {"TPU_SKIP_MDS_QUERY": "1"}
    flags = os.environ.get("XLA_FLAGS", ""), f"--xla_dump_to={folder}", "--xla_dump_hlo_as_text"
    return variables | {"XLA_FLAGS": " ".join(flags)}


def devices(target: str, count: int) -> list[Any]:
    """Devices of a target that are not here, to compile for."""
    if TARGETS[target] == "tpu":
        slice_name = f"{target}:{_SLICES[count]}"
        return list(topologies.get_topology_desc(slice_name, platform="tpu").devices)[:count]
    facts = pathlib.Path(__file__).with_name(f"{target}.txtpb").read_text()
    # All in one host.
    there = topologies.get_topology_desc(
        platform="cuda", target_config=facts, topology=f"1x1x{count}"
    )
    return list(there.devices)


def _abstract(tree: Any, where: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def count(program: str, thunks: str, platform: str, steps: int) -> dict[str, Any]:
    """What a step executes: the `KEYS` of the platform that can be told, and else `error`.

    Args:
      program: text, see `bench_program.read_program`.
      thunks: likewise, see `bench_program.read_thunks`; of a TPU "".
      platform: "gpu" or "tpu".
      steps: of the chunk.
    """
    found: dict[str, Any] = {}
    read = bench_program.read_program(program)
    try:
        step = bench_program.step_name(read, steps)
        found["all_reduces"] = bench_program.total(read, step, bench_program.all_reduces)
        if platform == "gpu":
            pair = bench_program.launches(bench_program.read_thunks(thunks), read, steps)
            found["launches"], found["host_submissions"] = pair
        else:
            for key, name in (("cycles_per_step", step), ("cycles_per_chunk", "ENTRY")):
                found[key] = bench_program.total(read, name, bench_program.cycles)
    except UserError as error:
        found["error"] = str(error)
    return found


def compile_chunk(case: bench_worker.Case, target: str, folder: str) -> dict[str, Any]:
    """A row, see `KEYS`.

    Args:
      case: with at least one device.
      target: of `TARGETS`.
      folder: see `environment`.

    Raises:
      UserError: it makes no sense, or does not compile.
    """
    if case.overrides.get("train.num_seeds", "1") != "1":
        raise UserError("--compile_for compiles one net, not train.num_seeds of them together")
    # Made on the CPU, as a run makes it: then all but the devices stays as it is.
    here, platform = (
        bench_worker.make_experiment(dataclasses.replace(case, devices=1)),
        TARGETS[target],
    )
    try:
        mesh = sharding.make_mesh(devices(target, case.devices), case.batch_size)
        run = dataclasses.replace(here, mesh=mesh, model=setup.make_model(here.config, platform))
        steps = feed.chunk_steps(here.train_feed, here.config.train.chunk_steps, platform)
        everywhere = sharding.replicated(mesh)
        arguments = (
            _abstract(run.abstract_state(), everywhere),
            _abstract(here.train_feed.resident, everywhere),
            _abstract(here.train_feed.chunk(0, steps), sharding.split(mesh, 1)),
        )
        # Pallas asks what it compiles for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = run.make_train_chunk().lower(*arguments, None)
        begin = time.perf_counter()
        compiled = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"{target}: {str(error).splitlines()[0]}") from error
    seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
    thunks = "".join(path.read_text() for path in pathlib.Path(folder).glob(_THUNKS))
    return dict.fromkeys(KEYS) | {
        "model": case.model,
        "target": target,
        "devices": case.devices,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
        **count(compiled.as_text(), thunks, platform, steps),
    }


def describe(cases: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """A table of what was compiled, and what could not be told; a row for each case."""
    lines = [bench_report.table([c | r for c, r in zip(cases, rows, strict=True)], _COLUMNS)]
    return "\n".join(lines + [f"{r['model']}: {r['error']}" for r in rows if "error" in r])


def main(argv: list[str]) -> None:
    """Prints the row of one case."""
    case = json.loads(argv[0])
    target, folder = case.pop("target"), case.pop("folder")
    print(json.dumps(compile_chunk(bench_worker.Case(**case), target, folder)))


if __name__ == "__main__":
    entry.run(main)
