"""How costs grow: with depth, batch, devices and seeds; and how long a run takes to begin.

    python -m tests.benchmarks.growth --out=growth.json
    python -m tests.benchmarks.growth --parts=depth,batch --depth_batch=128 --out=growth.json

Steps are measured as by `resnet_flax.tools.bench`; what --out holds is not measured again. "power"
is the exponent p of cost ~ size^p between a row and the one before: 1 is in proportion. Seeds train
in one program (`config.train.num_seeds`); "nets an hour" compares that with one after the other.
The start is the time from the command of `resnet_flax.main` to the first line of metrics.jsonl,
with an empty cache and with what that run has left there: by default of ResNet-20 on the digits,
with --start_config=configs/resnet20.py on CIFAR-10.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from resnet_flax import models
from resnet_flax.runs import files
from resnet_flax.tools import bench, bench_measure

PARTS = "depth", "batch", "devices", "seeds", "start"
DEPTHS = "resnet20,resnet32,resnet44,resnet56,resnet110,resnet1202"


def power(sizes, costs):
    """The exponent between each point and the one before; None for the first."""
    exponents = np.diff(np.log(costs)) / np.diff(np.log(sizes))
    return [None, *exponents.tolist()][: len(sizes)]


def table(title, sizes, rows):
    """Each size with its step, compilation and memory, and what failed."""
    pairs = list(zip(sizes, rows, strict=True))
    good = [(size, row["measured"]) for size, row in pairs if "error" not in row]
    steps = [statistics.median(m["step_seconds"]) for _, m in good]
    compiled = [m["compile_seconds"] for _, m in good]
    powers = [power([size for size, _ in good], costs) for costs in (steps, compiled)]
    lines = []
    for (size, measured), *exponents in zip(good, *powers, strict=True):
        cells = {title: size, "ms/step": [1e3 * s for s in measured["step_seconds"]]}
        cells |= {"power": exponents[0], "images/s": measured["train_images_per_second"]}
        cells |= {"compile s": measured["compile_seconds"], "its power": exponents[1]}
        lines.append(cells | {"temporary MB": measured["temporary_bytes"] / 1e6})
    failed = [f"failed: {title} {size}: {row['error']}" for size, row in pairs if "error" in row]
    return "\n".join([bench.table(lines, list(lines[0]) if lines else [title]), *failed])


def nets_an_hour(seeds, rows):
    seconds = {
        n: statistics.median(row["measured"]["step_seconds"])
        for n, row in zip(seeds, rows, strict=True)
        if "error" not in row
    }
    return "\n".join(
        f"nets an hour, {n} seeds together: {n * seconds[1] / s:.2f} times as many"
        for n, s in seconds.items()
        if 1 in seconds and n > 1
    )


def start_seconds(flags, cache, folder):
    """Seconds from the command to the first training record of a run in `folder`."""
    # A chunk of one step ends as the first does.
    keys = {"train.total_steps": 2, "train.chunk_steps": 1, "log.every_steps": 1}
    flags = [*flags, f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in keys.items())]
    environment = os.environ | {"RESNET_FLAX_CACHE": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    first, log = None, folder / "metrics.jsonl"
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "resnet_flax.main", *flags],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=pathlib.Path(__file__).parents[2],
            env=environment,
        )
        while process.poll() is None:
            if first is None and log.exists() and b"\n" in log.read_bytes():
                first = time.perf_counter() - begin
            time.sleep(0.01)
        errors.seek(0)
        said = errors.read().strip().rpartition("\n")[2]
    if process.returncode or first is None:
        raise RuntimeError(f"status {process.returncode}: {said[:300]}")
    return first


def measure_start(flags, repeats):
    """`cold` and `cached`: a list of `start_seconds`; or `error`."""
    found = {"cold": [], "cached": []}
    try:
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="resnet_flax_growth_") as place:
                for kind, seconds in found.items():
                    folder = pathlib.Path(place) / kind
                    seconds.append(start_seconds(flags, f"{place}/cache", folder))
    except RuntimeError as error:
        return {"error": str(error)}
    return found


def main(argv=None):
    """Prints a table for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="of %(default)s")
    add("--depths", default=DEPTHS, help="nets, from the shallowest on")
    add("--depth_batch", type=int, default=16, help="examples a step of each depth")
    add("--batches", default="64,128,256,512,1024,2048,4096")
    add("--devices", default="1,2,4,8", help="numbers of them; a CPU is split into as many")
    add("--seeds_devices", type=int, default=0, help="devices for them; 0: as a run would use")
    add("--model", default="resnet20", help="net of the batches, devices and seeds")
    add("--batch", type=int, default=128, help="examples a step (and net) of devices and seeds")
    add("--seeds", default="1,2,4,8,16", help="numbers of nets in one program")
    add("--start_config", default="configs/quickstart.py", help="of the start")
    add("--data_dir", help="where TFDS has the start's data")
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=2.0, help="shortest timing")
    add("--out", type=pathlib.Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts={args.parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}")

    def case(model, batch, devices, seeds=1):
        overrides = {"train.num_seeds": str(seeds)} if seeds > 1 else {}
        rest = "auto", devices, args.repeats, args.seconds, 50_000, ["train"], overrides
        return dataclasses.asdict(bench_measure.Case(model, batch, *rest))

    nets = args.depths.split(",")
    batches, devices, seeds = (
        [int(x) for x in text.split(",")] for text in (args.batches, args.devices, args.seeds)
    )
    plan = {
        "depth": (
            [models.get_architecture(net).weighted_layers for net in nets],
            [case(net, args.depth_batch, 1) for net in nets],
        ),
        "batch": (batches, [case(args.model, batch, 1) for batch in batches]),
        "devices": (devices, [case(args.model, args.batch, n) for n in devices]),
        "seeds": (seeds, [case(args.model, args.batch, args.seeds_devices, n) for n in seeds]),
    }
    texts = []
    for part in [p for p in plan if p in parts]:
        sizes, cases = plan[part]
        rows = bench.run_cases(cases, args.out)["rows"]
        texts.append(table(part, sizes, rows))
        if part == "seeds":
            texts.append(nets_an_hour(seeds, rows))
    if "start" in parts:
        content = files.read_json(args.out) or {"rows": []}
        starts = content.setdefault("start", {})
        found = starts.get(args.start_config, {"error": ""})
        if "error" in found:
            flags = [f"--config={args.start_config}"]
            flags += [f"--config.data.data_dir={args.data_dir}"] if args.data_dir else []
            found = starts[args.start_config] = measure_start(flags, args.repeats)
            files.write_json(args.out, content)
        texts.append(f"seconds to the first record, {args.start_config}")
        is_error = "error" in found
        texts.append(f"failed: {found['error']}" if is_error else bench.table([found], list(found)))
    print("\n\n".join(texts))
    if any("failed: " in text for text in texts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
