r"""Measures the speed of training and evaluation, and how far it is from what the devices can do.

python -m resnet_flax.tools.bench
python -m resnet_flax.tools.bench --models=resnet20,resnet110 --batch_sizes=128,1024 \
    --dtypes=float32,bfloat16 --devices=1,2 --out=bench.json

Every combination runs in a process of its own, on random images of the size of the net's data set,
and executes what a training run does: the same compiled function, steps a dispatch and feed. With
--out, what a file of that name holds already is not measured again.

The ceilings are measured in the same process: the product of two large matrices of the same dtype,
and adding to a large array in place. "of matmul" is the multiply-adds of the net's convolutions and
dense layer, three times for forwards and backwards, as a share of the first. "of bandwidth" is what
XLA counts as read and written by the program's instructions as a share of the second; it knows no
caches. "x limit" is the time of a step over the larger of the two shares' times.

python -m resnet_flax.tools.bench --compile_for=h100 --models=resnet20,resnet110
python -m resnet_flax.tools.bench --compile_for=v5e --devices=8 --json

Compiles, with the compiler of devices that are not there, the training steps that a run on them
would dispatch at once (--compile_for: h100, v5e, v6e), and executes nothing. Of a GPU it counts
what a step launches, also inside CUDA graphs, and what of that the host submits, where a graph is
one. Of a TPU it adds up the cycles that the compiler expects, of a step and of the whole chunk.
"""

import functools
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from resnet_flax import models
from resnet_flax.config import base_config, flatten, imagenet_config, nearest_key
from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.tools import bench_offline, bench_report, entry

_DTYPES = "auto", "float32", "bfloat16"
_PARTS = "train", "eval", "ceilings", "first_step"


def run_worker(
    case: dict[str, Any],
    *,
    timeout: float | None = None,
    cache: str | None = None,
    module: str = "bench_worker",
    variables: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a module of `tools` prints for a case, in a process of its own.

    Args:
      case: see `bench_worker.Case`.
      timeout: seconds after which it is ended.
      cache: directory of its compilation cache; None: as the environment has it.
      module: "bench_worker" or "bench_offline".
      variables: of its environment, beside this process's.

    Raises:
      UserError: it failed, with the last line that it said.
    """
    # What an earlier run has left in the user's cache is no measure of compiling.
    environment = os.environ | {"RESNET_FLAX_CACHE": ""} | (variables or {})
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    command = [sys.executable, "-m", f"resnet_flax.tools.{module}"]
    case = {**case, "started": time.time()}
    try:
        done = subprocess.run(
            [*command, json.dumps(case)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"took more than --timeout={timeout:g} seconds") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(lines[-1].removeprefix("error: ")[:500])
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
    """A row: `case`, and `measured`, `summary` and `first_step`, or else `error`.

    Args:
      case: see `bench_worker.Case`; its part "first_step" starts two more processes: one with an
        empty compilation cache, and one that finds there what the first has compiled.
      timeout: seconds for each process.
    """
    row: dict[str, Any] = {"case": case}
    parts = [part for part in case["parts"] if part != "first_step"]
    try:
        if parts:
            row["measured"] = run_worker({**case, "parts": parts}, timeout=timeout)
            examples = case["batch_size"] * row["measured"].get("seeds", 1)
            row["summary"] = bench_report.summarize(row["measured"], examples)
        if "first_step" in case["parts"]:
            alone = {**case, "parts": ["first_step"]}
            with tempfile.TemporaryDirectory(prefix="resnet_flax_bench_") as cache:
                row["first_step"] = {
                    name: run_worker(alone, timeout=timeout, cache=cache)
                    for name in ("cold", "cached")
                }
    except UserError as error:
        return {"case": case, "error": str(error)}
    return row


def compile_case(case: dict[str, Any], *, target: str, timeout: float | None = None):
    """A row, see `bench_offline.KEYS`, of a case compiled for `target` in a process of its own.

    Args:
      case: see `bench_worker.Case`.
      target: of `bench_offline.TARGETS`.
      timeout: seconds.
    """
    with tempfile.TemporaryDirectory(prefix="resnet_flax_bench_") as folder:
        try:
            return run_worker(
                {**case, "target": target, "folder": folder},
                timeout=timeout,
                module="bench_offline",
                variables=bench_offline.environment(target, folder),
            )
        except UserError as error:
            known = {"model": case["model"], "target": target, "devices": case["devices"]}
            return dict.fromkeys(bench_offline.KEYS) | known | {"error": str(error)}


def _numbers(flag: str, text: str, least: int) -> list[int]:
    try:
        values = [int(x) for x in text.split(",")]
    except ValueError as error:
        raise UserError(f"{flag}={text} must be whole numbers, separated by commas") from error
    if min(values) < least:
        raise UserError(f"{flag}={text}: {min(values)} is less than {least}")
    return values


def _words(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    values = text.split(",")
    for value in values:
        if value not in known:
            raise UserError(f"{flag}={text}: {value!r} must be one of {', '.join(known)}")
    return values


def _overrides(given: list[str]) -> dict[str, str]:
    known, found = flatten(base_config()), {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set={text} must be KEY=VALUE, for example model.remat=True")
        if key not in known:
            near = nearest_key(key)
            raise UserError(
                f"--set={text}: {key!r} is no config key" + (f"; {near!r}?" if near else "")
            )
        found[key] = value
    return found


def make_cases(args) -> list[dict[str, Any]]:
    """Every combination that the flags ask for.

    Raises:
      UserError: a flag makes no sense.
    """
    names = args.models.split(",")
    for name in names:
        models.get_architecture(name)
    batches = _numbers("--batch_sizes", args.batch_sizes or "128", 1)
    counts = _numbers("--devices", args.devices, 0)
    dtypes = _words("--dtypes", args.dtypes, _DTYPES)
    for batch, count in itertools.product(batches, counts):
        if count and batch % count:
            raise UserError(f"--devices: {count} devices do not divide a batch of {batch}")
    for flag, least in (("repeats", 1), ("steps", 0), ("examples", 0), ("eval_examples", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag}={getattr(args, flag)} is less than {least}")
    if args.seconds <= 0 or args.timeout < 0:
        raise UserError(f"--seconds={args.seconds:g} and --timeout={args.timeout:g}: above 0")
    if args.examples and args.examples < max(batches):
        raise UserError(f"--examples={args.examples} is less than a batch of {max(batches)}")
    common = {
        "repeats": args.repeats,
        "seconds": args.seconds,
        "steps": args.steps,
        "examples": args.examples,
        "eval_examples": args.eval_examples,
        "parts": _words("--parts", args.parts, _PARTS),
        "overrides": _overrides(args.set),
    }
    return [
        {"model": name, "batch_size": batch, "dtype": dtype, "devices": count, **common}
        for name, batch, dtype, count in itertools.product(names, batches, dtypes, counts)
    ]


def make_offline_cases(args) -> list[dict[str, Any]]:
    """The same with --compile_for: at least one device, and the recipes' batch sizes.

    Raises:
      UserError: a flag makes no sense, or there is no compiler.
    """
    if args.out:
        raise UserError("--out is for measurements; with --compile_for print --json to a file")
    cases = make_cases(args)
    for case in cases:
        case["devices"] = case["devices"] or 1
        if not args.batch_sizes and models.get_architecture(case["model"]).image_size > 32:
            case["batch_size"] = imagenet_config().data.batch_size
    bench_offline.check(args.compile_for, [case["devices"] for case in cases])
    return cases


def _parser():
    parser = entry.parser(__doc__)
    add = parser.add_argument
    add("--models", default="resnet20", help="nets, separated by commas")
    add("--compile_for", metavar="DEVICE", help="compile only, for h100, v5e or v6e")
    add("--batch_sizes", help="examples a step, over all devices; default: 128")
    add("--dtypes", default="auto", help="float32, bfloat16; auto: bfloat16 off the CPU")
    add("--devices", default="0", help="how many; 0: as many as a run would use")
    add("--parts", default=",".join(_PARTS), help="what to measure, of %(default)s")
    add("--repeats", type=int, default=5, help="timings of each thing")
    add("--seconds", type=float, default=2.0, help="least length of one")
    add("--steps", type=int, default=0, help="instead, its least number of training steps")
    add("--examples", type=int, default=0, help="training images; default: 50,000")
    add("--eval_examples", type=int, default=0, help="test images; default: 10,000; CPU: 2,000")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the config")
    add("--timeout", type=float, default=0.0, help="seconds for each process; 0: no limit")
    add("--out", help="JSON file, kept up to date row by row")
    add("--json", action="store_true", help="print JSON")
    return parser


def run_cases(
    cases: list[dict[str, Any]],
    path: pathlib.Path | None,
    *,
    timeout: float | None = None,
    run: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measures all cases; tells of each on stderr as it begins.

    Args:
      cases: see `bench_worker.Case`.
      path: a JSON file kept up to date row by row; what it holds already, but for failures, is not
        measured again. Its other content stays.
      timeout: see `run_case`.
      run: makes other rows, which `path` cannot keep; None: `run_case`.

    Returns:
      `command`, and `rows`, see `run_case`.
    """
    content = (files.read_json(path) if path else None) or {}
    old = content.get("rows", [])
    rows: list[dict[str, Any]] = []
    command = shlex.join([pathlib.Path(sys.executable).name, *sys.orig_argv[1:]])
    for number, case in enumerate(cases, 1):
        row = next((r for r in old if r["case"] == case and "error" not in r), None)
        if row is None:
            what = ", ".join(f"{k} {case[k]}" for k in ("model", "batch_size", "dtype", "devices"))
            print(f"{number} of {len(cases)}: {what}", file=sys.stderr, flush=True)
            row = (run or run_case)(case, timeout=timeout)
        rows.append(row)
        if path:
            others = [r for r in old if r["case"] not in [x["case"] for x in rows]]
            content |= {"command": command, "rows": rows + others}
            files.write_json(path, content)
    return {"command": command, "rows": rows}


def main(argv: list[str]) -> None:
    """Measures what the flags ask for, and prints it."""
    args = _parser().parse_args(argv)
    if args.compile_for:
        cases = make_offline_cases(args)
        run = functools.partial(compile_case, target=args.compile_for)
        describe = functools.partial(bench_offline.describe, cases)
    else:
        cases, run, describe = make_cases(args), None, bench_report.describe
    path = pathlib.Path(args.out) if args.out else None
    if path and not path.parent.is_dir():
        raise UserError(f"--out={path}: there is no directory {path.parent}")
    content = run_cases(cases, path, timeout=args.timeout or None, run=run)
    print(json.dumps(content) if args.json else describe(content["rows"]))
    failed = sum("error" in row for row in content["rows"])
    if failed:
        raise UserError(f"{failed} of {len(cases)} combinations could not be measured")


if __name__ == "__main__":
    entry.run(main)
