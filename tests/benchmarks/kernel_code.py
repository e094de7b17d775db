"""What the compilers make of `models.fused` for an H100, without one.

python -m tests.benchmarks.kernel_code [--json]

Needs `pip install '.[offline_gpu]' nvidia-cuda-nvdisasm`.

For each layer of a CIFAR net at batch 128, forwards, backwards and the kernel's gradient:
registers, spills, instructions that a warp executes, by the loops in the machine code, and bytes
read and written. The estimate is arithmetic, not a time: instructions of all warps of a
multiprocessor at half an instruction a cycle and scheduler, or the bytes at 3.35 TB/s, whichever is
longer.
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

BATCH = 128
# (side, channels, outputs, strides) of the layers that differ.
LAYERS = (32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1)
KERNELS = "normalize_convolve", "convolve_backward", "kernel_gradient"
_PROCESSORS, _SCHEDULERS, _CLOCK, _BANDWIDTH = 132, 4, 1.75e9, 3.35e12
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*)$")


def compile_layer(side, channels, outputs, strides):
    """Compiles a layer with its gradients in this process; XLA_FLAGS says where to."""
    import jax
    import jax.numpy as jnp

    from resnet_flax.devices import sharding
    from resnet_flax.models import deferred, fused
    from resnet_flax.tools import bench_offline

    mesh = sharding.make_mesh(bench_offline.devices("h100", 1), BATCH)
    everywhere = sharding.replicated(mesh)

    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def layer(y, shortcut, scale, bias, kernel):
        sums = deferred.sums(y, 1)
        x = deferred.Normalized(y, sums, scale, bias, 1e-5, shortcut, True)
        out = fused.convolve(x, kernel, strides)
        return x.computed, out.y, out.sums

    def both_ways(arguments, gradients):
        out, pull = jax.vjp(layer, *arguments)
        return out, pull(gradients)

    image = spec(BATCH, side, side, channels)
    vector = spec(channels, dtype=jnp.float32)
    arguments = image, image, vector, vector, spec(3, 3, channels, outputs)
    out = spec(BATCH, side // strides, side // strides, outputs)
    sums = (spec(1, outputs, dtype=jnp.float32),) * 2
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jax.jit(both_ways).lower(arguments, (image, out, sums)).compile()


def executed(code: str, trips: int) -> int:
    """Instructions that a warp executes: loops within loops run 9 times, others `trips` times."""
    lines = [m.groups() for m in map(_INSTRUCTION.match, code.splitlines()) if m]
    labels, at = {}, 0
    for line in code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = at
        elif _INSTRUCTION.match(line):
            at += 1
    loops = []
    for position, (_, text) in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], at) < position:
            loops.append((labels[target[1]], position))

    def times(position):
        around = {loop for loop in loops if loop[0] <= position <= loop[1]}
        inner = [a for a in around if any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in loops)]
        # A loop over tiles that runs once is no loop in the code.
        inner = inner if trips > 1 else around
        return math.prod([9] * bool(inner) + [trips] * (bool(around - set(inner)) and trips > 1))

    last = max((i for i, (_, text) in enumerate(lines) if "EXIT" in text), default=len(lines))
    return sum(times(position) for position in range(last + 1))


def read(folder: pathlib.Path, layer: tuple[int, ...]) -> list[dict]:
    """A row for each kernel of a layer whose PTX lies in a folder."""
    from resnet_flax.models import fused

    side, channels, outputs, strides = layer
    found = []
    for path in sorted(folder.glob("*.ptx")):
        entry = re.search(r"\.entry (\w+)\(", path.read_text())
        name = entry and next((k for k in KERNELS if entry[1].startswith(k)), None)
        if not name:
            continue
        binary = folder / "kernel.cubin"
        log = _run("ptxas", "-arch=sm_90a", "-v", str(path), "-o", str(binary))
        code = _run("nvdisasm", "-c", str(binary))
        pixels = side * side, (side // strides) ** 2
        if name == "kernel_gradient":
            slices, tile = fused.SLICES[max(channels, outputs)]
            warps, programs = 4, 3 * slices
            trips = BATCH * pixels[1] // (tile * slices)
            moved = BATCH * 2 * (pixels[0] * channels + pixels[1] * outputs)
            moved += 2 * 4 * slices * 9 * channels * outputs
        else:
            tile, warps = fused.TILES[channels]
            programs = BATCH
            trips = max(1, pixels[name == "normalize_convolve"] // tile)
            arrays = (3, 1) if name == "normalize_convolve" else (5, 3)
            moved = BATCH * 2 * (pixels[0] * channels * arrays[0] + pixels[1] * outputs * arrays[1])
        count = executed(code, trips)
        rounds = math.ceil(programs / _PROCESSORS)
        cycles = rounds * warps * count / _SCHEDULERS / 0.5
        found.append(
            {
                "layer": f"{side}x{side}x{channels} to {outputs}",
                "kernel": name,
                "registers": int(re.search(r"Used (\d+) registers", log)[1]),
                "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", log)[1]),
                "instructions_a_warp": count,
                "warps": warps * programs,
                "megabytes": round(moved / 1e6, 1),
                "estimated_us": round(max(cycles / _CLOCK, moved / _BANDWIDTH) * 1e6, 1),
            }
        )
    return found


def _run(tool: str, *arguments: str) -> str:
    path = shutil.which(tool)
    if not path:
        import nvidia

        places = [pathlib.Path(p) for p in nvidia.__path__]
        path = next((str(f) for place in places for f in place.rglob(f"bin/{tool}")), None)
    if not path:
        sys.exit(f"error: {tool} is missing: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--layer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layer:
        return compile_layer(*map(int, args.layer.split(",")))
    rows = []
    for layer in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--xla_dump_to={folder} --xla_gpu_dump_llvmir=true --xla_dump_emitter_re=.*"
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-m", "tests.benchmarks.kernel_code", "--layer"]
            subprocess.run([*command, ",".join(map(str, layer))], env=environment, check=True)
            rows += read(pathlib.Path(folder), layer)
    if args.json:
        return print(json.dumps(rows, indent=1))
    print("| " + " | ".join(rows[0]).replace("_", " ") + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    return None


if __name__ == "__main__":
    main()
