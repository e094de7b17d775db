"""Expected scaling on accelerators, computed from compiled programs and published figures.

Nothing is run. The training step is compiled for N simulated CPU devices from shapes alone; its
all-reduces are counted from the compiled text and its operations taken from XLA's cost analysis.
Time is then modelled as

  compute   = operations / (peak rate x utilisation)
  collective = latency(N), one after the other for batch-norm statistics (each waits for the last),
               plus 2 (N - 1) / N x bytes / bandwidth
  efficiency = compute / (compute + collectives), nothing overlapped

    python -m tests.benchmarks.scaling
    python -m tests.benchmarks.scaling --only=resnet20 --utilisation 0.2
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

COUNTS = 8, 64, 256
# model, images per device at each of COUNTS (0: not possible)
CASES = [
    ("resnet20", (16, 2, 0)),  # the paper's batch of 128, split ever finer
    ("resnet20", (128, 128, 128)),
    ("resnet110", (16, 2, 0)),
    ("resnet110", (128, 128, 128)),
    ("resnet50", (32, 4, 1)),  # the paper's batch of 256
    ("resnet50", (128, 128, 128)),
]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a chip and its links can do at best, by their makers' figures."""

    name: str
    peak: float  # bfloat16 operations per second, dense
    bandwidth: Callable[[int], float]  # bytes per second that a chip sends in an all-reduce among N
    latency: Callable[[int], float]  # seconds of a small all-reduce among N


def _torus(shapes, wraps_from):
    """1 us a hop: to the middle of each axis and back; twice as far where it is no ring."""
    hops = {
        n: sum(size if size >= wraps_from else 2 * (size - 1) for size in shape)
        for n, shape in shapes.items()
    }
    return lambda n: 1e-6 * hops[n]


def _nccl_tree(n):
    """NCCL's own model (src/graph/tuning.cc) of a tree all-reduce, LL protocol, 8 GPUs a node."""
    nodes = max(1, n // 8)
    inside = 0.52e-6 * (1.8 if nodes > 1 else 1)
    return 4.4e-6 + 2 * ((min(n, 8) - 1) * inside + math.log2(nodes) * 5.0e-6)


HARDWARE = [
    Hardware(
        "TPU v5e",
        197e12,
        lambda n: 200e9 if n == 256 else 100e9,
        _torus({8: (2, 4), 64: (8, 8), 256: (16, 16)}, wraps_from=16),
    ),
    Hardware(
        "TPU v5p",
        459e12,
        lambda n: 600e9 if n > 8 else 300e9,
        _torus({8: (2, 2, 2), 64: (4, 4, 4), 256: (4, 8, 8)}, wraps_from=4),
    ),
    Hardware("H100/H200", 989e12, lambda n: 450e9 if n <= 8 else 400e9, _nccl_tree),
]

_ITEM = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)


def collectives(text):
    """Collective operations of a compiled program's text, as {kind: bytes of each}.

    All-reduces of nothing but per-channel sums are "statistics", all others "gradients" (XLA merges
    the sums of weights, their neighbours and the loss); other kinds keep their names.
    """
    found = {"statistics": [], "gradients": []}
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if not match:
            continue
        shapes = [
            (dtype, [int(d) for d in dims.split(",") if d])
            for dtype, dims in _SHAPE.findall(match["result"])
        ]
        kind = match["kind"]
        if kind == "all-reduce":
            # [groups, C], where a group is larger than a device.
            per_channel = all(len(dims) == 2 and dims[0] < dims[1] for _, dims in shapes)
            in_norm = re.search(r'op_name="[^"]*bn', line)
            kind = "statistics" if per_channel and in_norm else "gradients"
        size = sum(_ITEM[dtype] * math.prod(dims) for dtype, dims in shapes)
        found.setdefault(kind, []).append(size)
    return found


def compile_step(model, each, group):
    """The training step with `each` examples a device, compiled for all of jax's devices.

    `group` is the examples per batch-norm group; 0: the global batch.
    """
    import jax

    from resnet_flax.devices import sharding
    from resnet_flax.tools import bench_compile, bench_measure

    # A loop's body would be counted once.
    settings = {"model.bn_group_size": str(group), "model.scan": "never"}
    case = bench_measure.Case(model, each, "float32", 1, examples=each, overrides=settings)
    (here,) = bench_measure.make_setups(case)
    batch = each * jax.device_count()
    mesh = sharding.make_mesh(jax.devices(), batch)
    # It is only looked at: compiling it well would take longer.
    options = {"xla_backend_optimization_level": 0}
    compiled = bench_compile.lower(here, mesh, "tpu", 1, batch).compile(options)
    here.close()
    return compiled


def count(model, each, devices, grouped):
    """Counts of one step, compiled in a process of its own (jax counts devices once)."""
    code = (
        "import json, sys; from tests.benchmarks import scaling as s;"
        "c = s.compile_step(*json.loads(sys.argv[1]));"
        "print(json.dumps([s.collectives(c.as_text()), c.cost_analysis()['flops']]))"
    )
    arguments = json.dumps([model, each, each if grouped else 0])
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", code, arguments],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arguments} on {devices} devices:\n{done.stderr[-2000:]}")
    found, flops = json.loads(done.stdout.splitlines()[-1])
    return {"collectives": found, "flops": flops}


def efficiency(counts, hardware, devices, utilisation):
    """Share of a step that is computing, by the model above."""
    compute = counts["flops"] / (hardware.peak * utilisation)
    latency, bandwidth = hardware.latency(devices), hardware.bandwidth(devices)
    waiting = sum(
        latency + 2 * (devices - 1) / devices * size / bandwidth
        for sizes in counts["collectives"].values()
        for size in sizes
    )
    return compute / (compute + waiting)


def main():
    """Prints the counts of every program, then a table of efficiencies for each utilisation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="nets whose names hold this")
    add("--utilisation", type=float, nargs="+", default=[0.4, 0.1], help="of the peak rate, 0 to 1")
    args = parser.parse_args()
    import jax

    from resnet_flax.tools import bench

    lines = []
    for name, splits in CASES:
        for devices, each in zip(COUNTS, splits, strict=True):
            for grouped in (False, True) if each and args.only in name else ():
                counts = count(name, each, devices, grouped)
                statistics, gradients, *others = counts["collectives"].values()
                line = {"net": name, "devices": devices, "each": each}
                line |= {"bn": each if grouped else "global", "GFLOP": counts["flops"] / 1e9}
                line |= {"statistics": len(statistics), "KB": sum(statistics) / 1e3}
                line |= {"gradients": len(gradients), "MB": sum(gradients) / 1e6}
                lines.append(line | {"others": sum(map(len, others)), "counts": counts})
    if not lines:
        parser.error(f"--only={args.only} is in no name of {', '.join(dict(CASES))}")
    print(f"jax {jax.__version__}; computed, not measured")
    print(bench.table(lines, list(lines[0])[:-1]))
    for utilisation in args.utilisation:
        for line, chip in itertools.product(lines, HARDWARE):
            share = efficiency(line["counts"], chip, line["devices"], utilisation)
            line[chip.name] = f"{share:.1%}"
        print(f"\nexpected efficiency where a device computes at {utilisation:.0%} of its peak")
        print(bench.table(lines, ["net", "devices", "each", "bn", *(h.name for h in HARDWARE)]))


if __name__ == "__main__":
    main()
