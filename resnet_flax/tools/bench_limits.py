"""What a compiled program needs, and what the devices can do at best: for `tools.bench`."""

import math
import pathlib
import re
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from resnet_flax.devices import sharding

# Sizes for the ceilings: side of the matrices, bytes of the array that is added to.
_MATRIX = {"cpu": 1024, "accelerator": 8192}
_ARRAY = {"cpu": 2**27, "accelerator": 2**30}

_ITEM = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "f64": 8}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(
    r"\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<result>\([^)]*\)|\S+) (?P<operation>[\w\-]+)"
    r"\((?P<operands>[^)]*)\)(?P<rest>.*)"
)
_LIBRARY = re.compile(r'custom_call_target="__cu(dnn|blas)')


def traffic(text: str, resident_bytes: int) -> tuple[int, int]:
    """What XLA's count of bytes leaves out of a program, and what it counts too much.

    Args:
      text: `compiled.as_text()`.
      resident_bytes: size of the images that lie on the device.

    Returns:
      The bytes of operands and results, but for scratch space, of the calls of cuDNN and cuBLAS;
      how many fusions read the resident images: of each XLA counts all, whatever it picks.
    """
    results: dict[str, list[tuple[str, int]]] = {}
    instructions = [m for m in map(_INSTRUCTION.match, text.splitlines()) if m]
    for m in instructions:
        results[m["name"]] = [
            (dtype, math.prod(int(d) for d in dims.split(",") if d) * _ITEM.get(dtype, 4))
            for dtype, dims in _SHAPE.findall(m["result"])
        ]
    library = fusions = 0
    for m in instructions:
        operands = [a for x in _NAME.findall(m["operands"]) for a in results.get(x, [])]
        if m["operation"] == "custom-call" and _LIBRARY.search(m["rest"]):
            library += sum(size for _, size in operands)
            library += sum(size for dtype, size in results[m["name"]] if dtype != "u8")
        elif m["operation"] == "fusion":
            fusions += operands.count(("u8", resident_bytes))
    return library, fusions


def program(compiled, resident_bytes: int) -> dict[str, Any]:
    """What the compiled program says of itself, for one device, in bytes and operations.

    XLA counts a multiply-add as two operations, and the body of a loop once: a chunk of many steps
    as one step, a net whose blocks are scanned as one block a stage. Convolutions that are calls
    of a library are not counted at all.

    Args:
      compiled: as from `jax.jit(…).lower(…).compile()`.
      resident_bytes: see `traffic`.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, (list, tuple)) and cost else cost or {}
    library, fusions = traffic(compiled.as_text() or "", resident_bytes)
    sizes = ("temp", "argument", "output", "alias", "generated_code")
    return {
        "operations": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "library_bytes": library,
        "resident_bytes_counted": fusions * resident_bytes,
        **{f"{s}_bytes": getattr(memory, f"{s}_size_in_bytes", None) for s in sizes},
    }


def peak_memory(mesh: Mesh) -> dict[str, Any]:
    """The most memory used so far: of the fullest accelerator, or of this process on a CPU."""
    stats = [d.memory_stats() or {} for d in mesh.devices.flat if d.platform != "cpu"]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return {"of": "device", "bytes": max(peaks), "limit": stats[0].get("bytes_limit")}
    try:
        # getrusage would count what the parent had, too.
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        peak = next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"of": "process", "bytes": peak, "limit": None}


def ceilings(mesh: Mesh, dtype: DTypeLike, *, repeats: int, seconds: float) -> dict[str, Any]:
    """What the devices do at best, all together, as the fastest of `repeats` timings.

    Returns:
      `operations`: per second, two to a multiply-add, of a product of square matrices of `dtype`,
      at the precision that the net's convolutions have; `bytes`: read and written per second, where
      1 is added to a large float32 array in place. One of each on every device at once.
    """
    kind = "cpu" if sharding.platform(mesh) == "cpu" else "accelerator"
    where, side, size = sharding.split(mesh), _MATRIX[kind], _ARRAY[kind] // 4

    def timed(step, value, work):
        for _ in range(2):
            begin = time.perf_counter()
            value = jax.block_until_ready(step(value))
        count = max(1, min(100, math.ceil(seconds / 4 / (time.perf_counter() - begin))))
        found = []
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(count):
                value = step(value)
            jax.block_until_ready(value)
            found.append(work * count / (time.perf_counter() - begin))
        return found

    # Of random numbers: zeros take less power, and can be faster for it.
    draw = jax.jit(
        lambda seed: jax.random.normal(jax.random.key(seed), (mesh.size, side, side), dtype),
        out_shardings=where,
    )
    product = jax.jit(jnp.matmul, out_shardings=where)
    operations = timed(
        lambda v: (*v[:2], product(*v[:2])), (draw(0), draw(1)), 2 * side**3 * mesh.size
    )
    array = jax.jit(lambda: jnp.full((mesh.size, size), 0.1), out_shardings=where)()
    add = jax.jit(lambda x: x + 1, out_shardings=where, donate_argnums=0)
    moved = timed(add, array, 8 * size * mesh.size)
    return {
        "operations": max(operations),
        "bytes": max(moved),
        "operations_raw": operations,
        "bytes_raw": moved,
    }
