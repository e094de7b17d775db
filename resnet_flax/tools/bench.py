r"""Measures how fast models train and are evaluated, how long they compile, and their memory.

python -m resnet_flax.tools.bench
python -m resnet_flax.tools.bench --models=resnet20,resnet110 --batch_sizes=128,1024 \
    --dtypes=float32,bfloat16 --devices=1,2 --out=bench.json

Every combination executes what a training run does, in a process of its own, on random images,
with no programs compiled by earlier runs. What the file --out holds already is not measured again.
"matmul_share" is the multiply-adds of convolutions and dense layers, three times for forwards and
backwards, as a share of the rate of a product of large matrices ("ceiling").

python -m resnet_flax.tools.bench --compile_for=h100 --models=resnet20,resnet110
python -m resnet_flax.tools.bench --compile_for=v5e --devices=8 --json

Compiles the steps that a run would dispatch at once, for devices that are not here (h100, v5e,
v6e), and executes nothing. For a GPU it counts what a step launches, inside CUDA graphs too, and
what the host submits, where a graph is one. For a TPU it adds up the cycles that the compiler
expects.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.tools import bench_compile, bench_measure, entry

Row = dict[str, Any]

COMPILED = (
    "model target devices launches host_submissions cycles_per_step cycles_per_chunk "
    "argument_bytes temporary_bytes all_reduces compile_seconds"
).split()
"""Keys of a row with --compile_for; None where there is no such number."""

_MEASURED = (
    "model batch_size dtype devices train_images_per_second step_seconds matmul_share "
    "eval_images_per_second compile_seconds temporary_bytes peak_bytes"
).split()
_COMPILERS = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}


def run_case(case: Row, target: str | None = None) -> Row:
    """Measures a `bench_measure.Case`, or compiles it for a target, in a process of its own.

    Returns `case` and `measured`, or the keys `COMPILED`; `error` says why something is missing.
    """
    with tempfile.TemporaryDirectory(prefix="resnet_flax_bench_") as folder:
        command = [sys.executable, "-m", "resnet_flax.tools.bench_measure", json.dumps(case)]
        if target:
            command[2:] = ["resnet_flax.tools.bench_compile", json.dumps(case), target, folder]
        env = _environment(target, folder)
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        found = {"error": lines[-1].removeprefix("error: ")[:500]}
    else:
        found = json.loads(done.stdout.splitlines()[-1])
    if target:
        known = {"model": case["model"], "target": target, "devices": case["devices"]}
        return dict.fromkeys(COMPILED) | known | found
    return {"case": case} | (found if "error" in found else {"measured": found})


def _environment(target: str | None, folder: str) -> dict[str, str]:
    # Programs in the user's cache would hide how long compiling takes.
    environment = os.environ | {"RESNET_FLAX_CACHE": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if target:
        environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    if bench_compile.TARGETS.get(target) == "gpu":
        # XLA reads only once, from the environment, where to write its list of launches.
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
    return environment


def run_cases(cases: Sequence[Row], path: pathlib.Path | None, target: str | None = None) -> Row:
    """`command`, and `rows`: one of `run_case` for each case.

    The JSON file `path` is updated row by row. Cases that it holds are not run again unless they
    failed; its other content stays.
    """
    content = (files.read_json(path) if path else None) or {}
    known = {json.dumps(row["case"]): row for row in content.get("rows", [])}
    command = shlex.join([pathlib.Path(sys.executable).name, *sys.orig_argv[1:]])
    for number, case in enumerate(cases, 1):
        key = json.dumps(case)
        if key in known and "error" not in known[key]:
            continue
        what = ", ".join(f"{k} {case[k]}" for k in ("model", "batch_size", "dtype", "devices"))
        print(f"{number} of {len(cases)}: {what}", file=sys.stderr, flush=True)
        known[key] = run_case(case, target)
        if path:
            rows = list(known.values())
            files.write_json(path, content | {"command": command, "rows": rows})
    return {"command": command, "rows": [known[json.dumps(case)] for case in cases]}


def table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A column for each key: a list's median and range; a dash where a row has no value."""

    def text(value):
        if isinstance(value, list):
            middle, least, most = statistics.median(value), min(value), max(value)
            return f"{text(middle)} ({text(least)} to {text(most)})"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else value

    lines = [keys, *([text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.rjust(width) for x, width in zip(line, widths, strict=True)) for line in lines
    )


def _describe(rows: Sequence[Row]) -> str:
    flat = [row.get("case", {}) | row.get("measured", row) for row in rows]
    lines = [table(flat, COMPILED if "target" in rows[0] else _MEASURED)]
    lines += dict.fromkeys(
        f"{about['hardware']}; jax {about['versions']['jax']}; commit {about['commit']}"
        for about in (row["environment"] for row in flat if "environment" in row)
    )
    lines += [f"{row['model']}: {row['error']}" for row in flat if "error" in row]
    return "\n".join(lines)


def _make_cases(args: argparse.Namespace) -> list[Row]:
    overrides = dict(change.partition("=")[::2] for change in args.set)
    if unknown := set(args.parts) - set(bench_measure.PARTS):
        known = ", ".join(bench_measure.PARTS)
        raise UserError(f"--parts: {unknown.pop()!r} must be one of {known}")
    if args.repeats < 1 or args.seconds <= 0:
        raise UserError(f"--repeats={args.repeats} and --seconds={args.seconds:g} must be above 0")
    fewest = 1 if args.compile_for else 0
    devices = [max(fewest, count) for count in args.devices]
    rest = args.repeats, args.seconds, args.examples, args.parts, overrides
    cases = []
    for options in itertools.product(args.models, args.batch_sizes, args.dtypes, devices):
        case = bench_measure.Case(*options, *rest)
        batch_size = bench_measure.make_config(case).data.batch_size
        cases.append(dataclasses.asdict(case) | {"batch_size": batch_size})
    return cases


def whole_numbers(text: str) -> list[int]:  # its name is in argparse's message
    """Parses numbers separated by commas."""
    return [int(x) for x in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = entry.parser(__doc__)
    add = parser.add_argument
    add("--models", type=_names, default="resnet20", help="names, separated by commas")
    add("--compile_for", choices=bench_compile.TARGETS, help="compile only, for this device")
    add("--batch_sizes", type=whole_numbers, default="0", help="of all devices; 0: the recipe's")
    add(
        "--dtypes",
        type=_names,
        default="auto",
        help="float32, bfloat16; auto: bfloat16 off the CPU",
    )
    add("--devices", type=whole_numbers, default="0", help="0: as many as a run would use")
    add("--parts", type=_names, default=",".join(bench_measure.PARTS), help="of %(default)s")
    add("--repeats", type=int, default=5, help="timings of each thing")
    add("--seconds", type=float, default=2.0, help="shortest timing")
    add("--examples", type=int, default=0, help="training images; default: 50,000")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the config")
    add("--out", type=pathlib.Path, help="JSON file, updated row by row")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(argv: list[str]) -> None:
    """Measures or compiles, and prints the rows."""
    args = _parser().parse_args(argv)
    cases, target = _make_cases(args), args.compile_for
    platform = bench_compile.TARGETS.get(target)
    if target and not any(map(importlib.util.find_spec, _COMPILERS[platform])):
        raise UserError(
            f"--compile_for={target} needs XLA's compiler for {platform.upper()}s: "
            f"pip install '.[offline-{platform}]'"
        )
    if target and args.out:
        raise UserError("--out is for measurements; with --compile_for print --json to a file")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out={args.out}: there is no directory {args.out.parent}")
    content = run_cases(cases, args.out, target)
    print(json.dumps(content) if args.json else _describe(content["rows"]))
    if failed := sum("error" in row for row in content["rows"]):
        raise UserError(f"{failed} of {len(cases)} combinations failed")


if __name__ == "__main__":
    entry.run(main)
