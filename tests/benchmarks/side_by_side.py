"""Times the training steps of this package, of the usual Flax way and of PyTorch, in turns.

    python -m tests.benchmarks.side_by_side --model=resnet20 --rounds=10
    python -m tests.benchmarks.side_by_side --platform=gpu --variants='*bfloat16*' --out=gpu.json

Each variant is a process of its own. They take turns, so that a change of the machine's speed
affects all alike. A turn is a number of steps, timed from the dispatch of the first to the results
of the last, without waiting in between. Ratios are medians and ranges over rounds.

All variants train the CIFAR net of [R §4.2] with option A, SGD with momentum 0.9 and weight decay
1e-4 on every parameter. This package also picks, crops, mirrors and normalises uint8 images from
the whole data set; the others get float32 batches that lie on the device. float32 is TF32 on recent
NVIDIA GPUs. PyTorch is an extra of the package: pip install -e '.[torch]'.
"""

import argparse
import contextlib
import fnmatch
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import shlex
import statistics
import sys
import time
import timeit
from concurrent import futures
from typing import Any, NamedTuple

from tests.benchmarks import pytorch_step


class Variant(NamedTuple):
    kind: str
    dtype: str
    platforms: tuple[str, ...] = ("cpu", "gpu")
    options: Any = ()  # of `this_package`: settings of its case; of PyTorch see `pytorch_step`


VARIANTS = {
    "usual Flax float32": Variant("flax", "float32"),
    "usual Flax bfloat16": Variant("flax", "bfloat16"),
    "this package float32 on one device": Variant("ours", "float32", ("cpu",), {"devices": 1}),
    "this package float32": Variant("ours", "float32", options={}),
    "this package bfloat16": Variant("ours", "bfloat16", options={}),
    "this package bfloat16 with kernels": Variant(
        "ours", "bfloat16", ("gpu",), {"overrides": {"model.kernels": "always"}}
    ),
    "this package float32 without CPU convolutions": Variant(
        "ours", "float32", ("cpu",), {"overrides": {"model.cpu_convolutions": "never"}}
    ),
    "PyTorch float32": Variant("torch", "float32"),
}
for _dtype in ("float32", "bfloat16"):
    for _name in ("channels-last", "compiled", "whole-step graph"):
        _platforms = ("gpu",) if _name == "whole-step graph" else ("cpu", "gpu")
        VARIANTS[f"PyTorch {_dtype} {_name}"] = Variant("torch", _dtype, _platforms, (_name,))

USUAL, OURS = "usual Flax {}", "this package {}"


def depth_of(name):
    """The n of `resnet<n>`."""
    digits = name.removeprefix("resnet")
    if not digits.isdigit() or int(digits) % 6 != 2 or int(digits) < 8:
        raise argparse.ArgumentTypeError(f"{name} must be resnet<6n+2>, for example resnet20")
    return int(digits)


# A builder returns a function from a number of steps to the last loss, which waits for it; the
# number of trained parameters; versions and hardware; and the steps that it does at once.


def this_package(depth, batch, dtype, options):
    """What a training run executes."""
    import jax

    from resnet_flax.devices import cpu
    from resnet_flax.runs import environment
    from resnet_flax.tools import bench_measure

    cpu.keep_freed_memory()
    case = bench_measure.Case(f"resnet{depth}", batch, dtype, **options)
    (run,) = bench_measure.make_setups(case)
    trainer = bench_measure.Trainer([run])

    def steps(count):
        trainer.run(count // trainer.length)
        return trainer.loss

    parameters = sum(x.size for x in jax.tree.leaves(run.abstract_state().params))
    return steps, parameters, environment.describe(run.mesh), trainer.length


def build(name, args):
    kind, dtype, _, options = VARIANTS[name]
    if kind == "flax":
        from tests.benchmarks import flax_step

        return *flax_step.make(args.depth, args.batch, dtype), 1
    if kind == "ours":
        return this_package(args.depth, args.batch, dtype, options)
    import torch

    if args.platform == "gpu" and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees no GPU")
    device = {"cpu": "cpu", "gpu": "cuda"}[args.platform]
    return *pytorch_step.make(args.depth, args.batch, dtype, options, device), 1


def load(name, platform):
    """The first task of a variant's process; all load at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.12")
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[platform]
    with contextlib.suppress(ImportError):
        importlib.import_module("torch" if VARIANTS[name].kind == "torch" else "flax")


_runs = {}  # of the variant of this process


def prepare(name, args):
    """The second: builds the variant; returns its row of the results."""
    _runs[name], parameters, about, unit = build(name, args)
    _runs[name](math.ceil(5 / unit) * unit)
    number, seconds = timeit.Timer(lambda: _runs[name](unit)).autorange()
    steps = unit * max(1, round(args.seconds * number / seconds))
    return {"steps": steps, "parameters": parameters, "about": about, "seconds": []}


def take_turn(name, steps):
    """Every later one; returns the seconds a step, and the loss."""
    begin = time.perf_counter()
    loss = _runs[name](steps)
    return (time.perf_counter() - begin) / steps, loss


def attempt(task, *arguments):
    """What `task` returns, or the reason why not, as text: not every exception can be sent."""
    try:
        return task(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


def measure(names, args):
    """`variants`: seconds a step in each round, by name; and `not_run`: why not, by name."""
    context = multiprocessing.get_context("spawn")
    found, not_run, workers = {}, {}, {}
    for name in names:
        if args.platform in (known := VARIANTS[name].platforms):
            workers[name] = futures.ProcessPoolExecutor(1, context)
            workers[name].submit(load, name, args.platform)
        else:
            not_run[name] = f"exists on {' and '.join(known)} only"

    def ask(name, *task):
        try:
            answer = workers[name].submit(attempt, *task).result()
        except futures.BrokenExecutor as error:
            answer = str(error)
        if isinstance(answer, str):
            not_run[name] = answer
            found.pop(name, None)
            workers.pop(name).shutdown()
            return None
        return answer

    # One by one, for compilers time candidates on the device.
    for name in list(workers):
        print(f"starting {name}", file=sys.stderr, flush=True)
        if row := ask(name, prepare, name, args):
            found[name] = row
    for number in range(args.rounds):
        # There and back, so that nobody always follows the same one.
        for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
            if turn := ask(name, take_turn, name, found[name]["steps"]):
                found[name]["seconds"].append(turn[0])
                found[name]["loss"] = turn[1]
    for worker in workers.values():
        worker.shutdown()
    for name in [n for n, f in found.items() if not math.isfinite(f["loss"])]:
        not_run[name] = f"its loss is {found.pop(name)['loss']}"
    counts = {f["parameters"] for f in found.values()}
    if len(counts) > 1:
        raise SystemExit(f"the nets differ: {counts} parameters")
    return {"variants": found, "not_run": not_run}


def ratios(found, slower, faster):
    """How many times as fast `faster` was, round by round; None where one did not run."""
    if slower not in found or faster not in found:
        return None
    pairs = zip(found[slower]["seconds"], found[faster]["seconds"], strict=True)
    return [a / b for a, b in pairs]


def table(result):
    """Medians and ranges. "over" is the multiple of a speed, in the row's dtype."""
    from resnet_flax.tools import bench

    found, rows = result["variants"], []
    for name, row in found.items():
        dtype, seconds = VARIANTS[name].dtype, row["seconds"]
        cells = {"variant": name, "ms/step": [1e3 * s for s in seconds]}
        cells["images/s"] = result["batch"] / statistics.median(seconds)
        cells["over usual Flax"] = ratios(found, USUAL.format(dtype), name)
        cells["this package over it"] = ratios(found, name, OURS.format(dtype))
        rows.append(cells)
    lines = [bench.table(rows, list(rows[0]))] if rows else []
    lines += [f"not run: {name}: {reason}" for name, reason in result["not_run"].items()]
    return "\n".join(lines)


def main(argv=None):
    """Prints the table, and writes everything measured to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=depth_of, default="resnet20", dest="depth", help="resnet<6n+2>")
    add("--batch", type=int, default=128)
    add("--platform", default="cpu", choices=("cpu", "gpu"))
    add("--variants", default="*", help="patterns of names, separated by commas")
    add("--rounds", type=int, default=10)
    add("--seconds", type=float, default=2.0, help="about, of a turn")
    add("--out", type=pathlib.Path, help="JSON file")
    args = parser.parse_args(argv)
    patterns = args.variants.split(",")
    names = [n for n in VARIANTS if any(fnmatch.fnmatch(n, p) for p in patterns)]
    if not names:
        parser.error(f"--variants={args.variants} is none of {', '.join(VARIANTS)}")
    if args.rounds < 1 or args.batch < 1:
        parser.error(f"--rounds={args.rounds} and --batch={args.batch} must be above 0")
    result = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "model": f"resnet{args.depth}",
        "batch": args.batch,
        "platform": args.platform,
        **measure(names, args),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['model']}, batch {args.batch}, {args.platform}, {args.rounds} rounds")
    abouts = [row["about"] for row in result["variants"].values() if "hardware" in row["about"]]
    for about in abouts[:1]:
        print(f"{about['hardware']}; commit {about['commit']}; {about['versions']}")
    print(table(result))


if __name__ == "__main__":
    main()
