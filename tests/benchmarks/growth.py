"""How costs grow: with depth, batch, devices and seeds; and how long a run takes to begin.

    python -m tests.benchmarks.growth --out=growth.json
    python -m tests.benchmarks.growth --parts=depth,batch --depth_batch=128 --out=growth.json

Steps and compilation are measured as by `resnet_flax.tools.bench`, whose rows --out holds; what is
there is not measured again. The seeds train in one program (`config.train.num_seeds`), on as many
devices as a run would use; "nets an hour" is how many times as many one can train so as one after
the other. "power" is the exponent p of cost ~ size^p between a row and the one
before: 1 is in proportion. The start is that of `resnet_flax.main`, from the command to the first
line of metrics.jsonl, with an empty cache (`RESNET_FLAX_CACHE`) and with what that run has left
there: by default of ResNet-20 on the digits, with --start_config=configs/resnet20.py on CIFAR-10.
"""

import argparse
import itertools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from resnet_flax import models
from resnet_flax.runs import files
from resnet_flax.tools import bench, bench_report

PARTS = "depth", "batch", "devices", "seeds", "start"
DEPTHS = "resnet20,resnet32,resnet44,resnet56,resnet110,resnet1202"


def power(sizes: Sequence[float], costs: Sequence[float]) -> list[float | None]:
    """The exponent between each point and the one before; None for the first."""
    pairs = list(zip(sizes, costs, strict=True))
    return [None] + [
        math.log(c1 / c0) / math.log(s1 / s0) for (s0, c0), (s1, c1) in itertools.pairwise(pairs)
    ]


def _case(model: str, batch: int, devices: int, args, seeds: int = 1) -> dict[str, Any]:
    return {
        "model": model,
        "batch_size": batch,
        "dtype": args.dtype,
        "devices": devices,
        "repeats": args.repeats,
        "seconds": args.seconds,
        "steps": args.steps,
        "examples": max(args.examples, batch),
        "eval_examples": 1,
        "parts": ["train"],
        "overrides": {"train.num_seeds": str(seeds)} if seeds > 1 else {},
    }


def _seeds(row: dict[str, Any]) -> int:
    return int(row["case"].get("overrides", {}).get("train.num_seeds", 1))


def table(title: str, sizes: Sequence[int], rows: Sequence[dict[str, Any]]) -> str:
    """Size, step and its power, tracing, compilation and its power, memory."""
    good = [(s, r) for s, r in zip(sizes, rows, strict=True) if "error" not in r]
    seconds = [r["summary"]["step_seconds"]["median"] for _, r in good]
    compiled = [r["measured"]["compile_seconds"] for _, r in good]
    powers = [power([s for s, _ in good], costs) for costs in (seconds, compiled)]
    columns = [
        (title, lambda r: str(r["size"])),
        ("ms/step (range)", lambda r: r["step"]),
        ("power", lambda r: f"{r['powers'][0]:.2f}"),
        ("images/s", lambda r: f"{_seeds(r) * r['case']['batch_size'] / r['seconds']:,.0f}"),
        ("trace s", lambda r: f"{r['measured']['trace_seconds']:.1f}"),
        ("compile s", lambda r: f"{r['measured']['compile_seconds']:.1f}"),
        ("power", lambda r: f"{r['powers'][1]:.2f}"),
        ("temporary MB", lambda r: f"{r['measured']['program']['temp_bytes'] / 1e6:,.0f}"),
        ("blocks in a loop", lambda r: "yes" if r["measured"]["scanned"] else "no"),
    ]
    lines = []
    for i, (size, row) in enumerate(good):
        spread = {k: 1e3 * v for k, v in row["summary"]["step_seconds"].items()}
        step = f"{spread['median']:.3g} ({spread['min']:.3g} to {spread['max']:.3g})"
        extra = {"size": size, "step": step, "seconds": seconds[i]}
        lines.append({**row, **extra, "powers": [p[i] for p in powers]})
    failed = [
        f"failed: {title} {s}: {r['error']}"
        for s, r in zip(sizes, rows, strict=True)
        if "error" in r
    ]
    return "\n".join([bench_report.table(lines, columns), *failed])


def nets_an_hour(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each number of seeds after one: what is gained by training them together."""
    seconds = {_seeds(r): r["summary"]["step_seconds"] for r in rows if "error" not in r}
    if 1 not in seconds:
        return "nets an hour: one seed has not been measured"
    alone = seconds.pop(1)["median"]
    return "\n".join(
        f"nets an hour, {n} seeds together: {n * alone / s['median']:.2f} times as many"
        for n, s in seconds.items()
    )


def start_seconds(
    flags: Sequence[str], cache: str, folder: pathlib.Path, timeout: float
) -> dict[str, float]:
    """Seconds from the command to the first training record and to the end of a run of two steps.

    Args:
      flags: of `resnet_flax.main`: its config, and what else is wanted.
      cache: directory of what is kept from run to run.
      folder: for the run; must not exist.
      timeout: seconds until it is ended.

    Raises:
      RuntimeError: it failed, or took too long.
    """
    root = pathlib.Path(__file__).parents[2]
    keys = {"train.total_steps": 2, "log.every_steps": 1, "log.tensorboard": False}
    # A chunk of one step ends as the first does.
    keys["train.chunk_steps"] = 1
    flags = [*flags, f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in keys.items())]
    command = [sys.executable, "-m", "resnet_flax.main", *flags]
    environment = os.environ | {"RESNET_FLAX_CACHE": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            cwd=root,
            env=environment,
        )
        first, log = None, folder / "metrics.jsonl"
        while process.poll() is None and time.perf_counter() - begin < timeout:
            if first is None and log.exists() and b"\n" in log.read_bytes():
                first = time.perf_counter() - begin
            time.sleep(0.01)
        total = time.perf_counter() - begin
        process.kill()
        errors.seek(0)
        said = (errors.read().strip().splitlines() or [""])[-1]
        if process.wait() or first is None:
            raise RuntimeError(f"status {process.returncode} after {total:.0f} s: {said[:300]}")
    return {"first_record": first, "end": total}


def measure_start(flags: Sequence[str], repeats: int, timeout: float) -> dict[str, Any]:
    """`cold` and `cached`: a list of what `start_seconds` returns; or `error`."""
    found: dict[str, Any] = {"cold": [], "cached": []}
    try:
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(prefix="resnet_flax_growth_") as place:
                for kind in found:
                    folder = pathlib.Path(place) / kind
                    seconds = start_seconds(flags, f"{place}/cache", folder, timeout)
                    found[kind].append(seconds)
    except RuntimeError as error:
        return {"error": str(error)}
    return found


def describe_start(found: dict[str, Any]) -> str:
    """A line for each kind of start."""
    if "error" in found:
        return f"start failed: {found['error']}"
    lines = []
    for kind, runs in found.items():
        first = [run["first_record"] for run in runs]
        lines.append(
            f"start, {kind}: first record after {statistics.median(first):.1f} s "
            f"({min(first):.1f} to {max(first):.1f}), {len(first)} run(s)"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
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
    add("--dtype", default="auto")
    add("--repeats", type=int, default=3)
    add("--seconds", type=float, default=2.0, help="about, of a timing")
    add("--steps", type=int, default=0, help="instead, its steps")
    add("--examples", type=int, default=50_000, help="training images")
    add("--timeout", type=float, default=0.0, help="seconds for each process; 0: no limit")
    add("--out", type=pathlib.Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts={args.parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    nets = args.depths.split(",")
    layers = [models.get_architecture(name).weighted_layers for name in nets]
    batches, devices, seeds = (
        [int(x) for x in t.split(",")] for t in (args.batches, args.devices, args.seeds)
    )
    plan = {
        "depth": (layers, [_case(net, args.depth_batch, 1, args) for net in nets]),
        "batch": (batches, [_case(args.model, batch, 1, args) for batch in batches]),
        "devices": (devices, [_case(args.model, args.batch, n, args) for n in devices]),
        "seeds": (
            seeds,
            [_case(args.model, args.batch, args.seeds_devices, args, n) for n in seeds],
        ),
    }
    texts = []
    for part in [p for p in plan if p in parts]:
        sizes, cases = plan[part]
        rows = bench.run_cases(cases, args.out, timeout=args.timeout or None)["rows"]
        texts.append(table(part, sizes, rows))
        if part == "seeds":
            texts.append(nets_an_hour(rows))
    if "start" in parts:
        content = files.read_json(args.out) or {}
        flags = [f"--config={args.start_config}"]
        flags += [f"--config.data.data_dir={args.data_dir}"] if args.data_dir else []
        found = content.get("start", {}).get(args.start_config)
        if not found or "error" in found:
            found = measure_start(flags, args.repeats, args.timeout or 3600.0)
            starts = {**content.get("start", {}), args.start_config: found}
            files.write_json(args.out, {"rows": [], **content, "start": starts})
        texts.append(f"{args.start_config}\n{describe_start(found)}")
    text = "\n\n".join(texts)
    print(text)
    if "failed: " in text:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
