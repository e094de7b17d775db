"""Where the time of a training step goes, and how fast its convolutions are, on a CPU.

    python -m tests.benchmarks.profile_step --model=resnet20
    taskset -c 0 python -m tests.benchmarks.profile_step --convolutions

Without a flag: three steps under jax's profiler, milliseconds a step summed over devices by kind of
operation. Operations that XLA hands to its thread pool and does not wait for are not in it.
--convolutions: GFLOP/s of the net's 3x3 convolutions one by one, and of a large matrix product.
"""

import argparse
import collections
import glob
import gzip
import json
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax.devices import cpu, hardware
from resnet_flax.models import cpu_convolution
from resnet_flax.tools import bench_worker

_INSTRUCTION = re.compile(r"(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")


def kinds(program: str) -> dict[str, str]:
    """What each instruction of a compiled program is, by name."""
    bodies, found, name = collections.defaultdict(list), {}, ""
    for line in program.splitlines():
        if line and not line.startswith(" ") and line.endswith("{"):
            name = line.split()[0].lstrip("%")
        elif match := _INSTRUCTION.match(line.strip()):
            bodies[name].append((*match.groups(), line))
    for own, shape, operation, _, line in bodies["ENTRY"]:
        called = re.search(r"calls=%([\w.\-]+)", line)
        body = bodies.get(called.group(1), []) if called else []
        lines = [inner[4] for inner in body if inner[2] == "convolution"]
        lines += [line] if operation == "convolution" else []
        if lines:
            window = re.search(r"window=\{([^}]*)\}", lines[0])
            shape = lines[0].split(" = ")[1].split("{")[0]
            found[own] = f"convolution to {shape}, {window and window.group(1)}"
        elif body:
            inside = {inner[2] for inner in body}
            kind = "reduction" if "reduce" in inside else "elementwise"
            found[own] = "transposition" if "transpose" in inside else kind
        else:
            found[own] = operation
    return found


def profile(model: str, batch: int, dtype: str) -> str:
    """A table of the kinds."""
    steps = 3
    trainer = bench_worker.Trainer(
        bench_worker.make_experiment(bench_worker.Case(model, batch, dtype))
    )
    trainer.run(4)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        trainer.run(1)
        times.append(time.perf_counter() - begin)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            trainer.run(steps)
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        events = json.load(gzip.open(path))["traceEvents"]
    kind_of, total, count = kinds(trainer.compiled.as_text()), {}, collections.Counter()
    for event in events:
        if name := event.get("args", {}).get("hlo_op"):
            kind = kind_of.get(name, name)
            total[kind] = total.get(kind, 0.0) + event["dur"] / 1e3 / steps
            count[kind] += 1
    lines = [f"{1e3 * statistics.median(times):.0f} ms a step, {len(jax.devices())} devices"]
    lines.append(f"{sum(total.values()):8.1f} ms in all operations below, of all devices together")
    for kind, spent in sorted(total.items(), key=lambda item: -item[1])[:30]:
        lines.append(f"{spent:8.1f} ms  {count[kind] / steps:5.0f} x  {kind}")
    return "\n".join(lines)


def _rate(operations: float, function, *args) -> str:
    function = jax.jit(function, compiler_options=hardware.compiler_options(jax.default_backend()))
    jax.block_until_ready(function(*args))
    times = []
    while len(times) < 3 or sum(times) < 0.5:
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return f"{operations / statistics.median(times) / 1e9:6.1f}"


def convolutions(batch: int) -> str:
    """A table of rates."""
    random, one = np.random.default_rng(0), ((1, 1), (1, 1))
    lines = ["GFLOP/s                   forwards  input's gradient  kernel's gradient  pairs"]
    for dtype in ("float32", "bfloat16"):
        for side, width in ((32, 16), (16, 32), (8, 64)):
            shapes = [(batch, side, side, width), (3, 3, width, width)]
            x, kernel = (jnp.asarray(random.standard_normal(s), dtype) for s in shapes)

            def plain(x, kernel):
                layout = ("NHWC", "HWIO", "NHWC")
                return jax.lax.conv_general_dilated(
                    x, kernel, (1, 1), one, dimension_numbers=layout
                )

            def ours(x, kernel):
                return cpu_convolution.convolve(x, kernel, 1, one)

            work = 2 * 9 * width**2 * batch * side**2
            rates = [
                _rate(work, plain, x, kernel),
                _rate(work, lambda x, k, g: jax.vjp(lambda x: plain(x, k), x)[1](g), x, kernel, x),
                _rate(work, lambda x, k, g: jax.vjp(lambda k: plain(x, k), k)[1](g), x, kernel, x),
                _rate(work, ours, x, kernel) if width == 16 else "     -",
            ]
            lines.append(f"{dtype:<9}{side:>3} x {side:<3} {width:>3} channels {'  '.join(rates)}")
        a = jnp.asarray(random.standard_normal((2048, 2048)), dtype)
        product = _rate(
            2 * 2048**3, lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32), a
        )
        lines.append(f"{dtype:<9}product of 2048 x 2048   {product}")
    return "\n".join(lines)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--convolutions", action="store_true")
    args = parser.parse_args()
    cpu.keep_freed_memory()
    if args.convolutions:
        print(convolutions(args.batch // 2))
    else:
        print(profile(args.model, args.batch, args.dtype))


if __name__ == "__main__":
    main()
