"""Times the training step of this package, of the usual Flax way, and of PyTorch, in turns.

    python -m tests.benchmarks.side_by_side --model=resnet20 --rounds=10
    python -m tests.benchmarks.side_by_side --platform=gpu --variants='*bfloat16*' --out=gpu.json

Each variant (see `variants`) lives in a process of its own, all at once but only one of them
working at a time, so that a change of the machine's speed meets all alike. A turn is a number of
steps, timed from the first one's dispatch until the last one's results are there, with no waiting
in between. Ratios are paired: of turns of the same round, medians over rounds and their range.
PyTorch is an extra of the package: pip install -e '.[torch]'.
"""

import argparse
import fnmatch
import json
import math
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from typing import Any

from tests.benchmarks import variants

USUAL, OURS = "usual Flax {}", "this package {}"


class FailedError(Exception):
    """Why a variant cannot be timed."""


class Worker:
    """A variant's process."""

    def __init__(self, name: str, model: str, batch: int, platform: str):
        """Starts it; it loads its framework at once."""
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.12"} | dict(os.environ)
        environment["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[platform]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.variants", name, model, str(batch), platform],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=pathlib.Path(__file__).parents[2],
        )

    def read(self, timeout: float) -> dict[str, Any]:
        """The next answer."""
        late = threading.Event()

        def end():
            late.set()
            self._process.kill()

        timer = threading.Timer(timeout, end)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if late.is_set():
            raise FailedError(f"no answer in {timeout:g} seconds")
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or [""]
            raise FailedError(f"exit status {self._process.returncode}: {said[-1][:300]}")
        answer = json.loads(line)
        if "cannot" in answer:
            raise FailedError(answer["cannot"])
        return answer

    def ask(self, steps: int, timeout: float) -> dict[str, Any]:
        """The answer to a number of steps."""
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # Why, `read` finds out.
        return self.read(timeout)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measure(
    names: list[str],
    *,
    model: str,
    batch: int,
    platform: str,
    rounds: int,
    seconds: float,
    steps: int,
    timeout: float,
) -> dict[str, Any]:
    """Times the variants.

    Returns:
      `variants`: by name what it said when it was ready, `steps` of a turn, `seconds` a step of
      each round, and its last `loss`; `not_run`: by name why.
    """
    found: dict[str, dict] = {}
    not_run = {
        name: f"exists on {' and '.join(variants.VARIANTS[name].platforms)} only"
        for name in names
        if platform not in variants.VARIANTS[name].platforms
    }
    workers = {n: Worker(n, model, batch, platform) for n in names if n not in not_run}

    def drop(name, error):
        not_run[name] = str(error)
        workers.pop(name).close()
        found.pop(name, None)

    try:
        # All load at once; then one by one, for compilers time candidates on the device.
        for name in list(workers):
            try:
                workers[name].read(timeout)
            except FailedError as error:
                drop(name, error)
        for name in list(workers):
            print(f"starting {name}", file=sys.stderr, flush=True)
            try:
                ready = workers[name].ask(0, timeout)
            except FailedError as error:
                drop(name, error)
                continue
            turn = steps or max(1, round(seconds / ready["step_seconds"]))
            turn = math.ceil(turn / ready["unit"]) * ready["unit"]
            found[name] = {**ready, "steps": turn, "seconds": []}
        for number in range(rounds):
            # There and back, so that nobody always follows the same one.
            for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
                try:
                    done = workers[name].ask(found[name]["steps"], timeout)
                except FailedError as error:
                    drop(name, error)
                    continue
                found[name]["seconds"].append(done["seconds"] / done["steps"])
                found[name]["loss"] = done["loss"]
    finally:
        for worker in workers.values():
            worker.close()
    for name in [n for n, f in found.items() if not math.isfinite(f["loss"])]:
        not_run[name] = f"its loss is {found.pop(name)['loss']}"
    counts = {f["parameters"] for f in found.values()}
    if len(counts) > 1:
        raise SystemExit(f"the nets differ: {counts} parameters")
    return {"variants": found, "not_run": not_run}


def ratios(found: dict[str, dict], slower: str, faster: str) -> list[float] | None:
    """How many times as fast `faster` was, round by round, from fewest to most."""
    if slower not in found or faster not in found:
        return None
    pairs = zip(found[slower]["seconds"], found[faster]["seconds"], strict=True)
    return sorted(a / b for a, b in pairs)


def _cell(values: list[float] | None) -> str:
    if values is None:
        return "-"
    return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def table(result: dict[str, Any], batch: int) -> str:
    """Medians, images a second, and the ratios to the usual way and to this package.

    Both of the same dtype: "over usual Flax" is the row's speed as a multiple of that, "this
    package over it" this package's as a multiple of the row's.
    """
    found, lines = result["variants"], []
    lines.append(
        f"{'variant':<36}{'ms/step':>9}{'fastest':>9}{'images/s':>11}"
        f"{'over usual Flax':>24}{'this package over it':>24}"
    )
    for name, row in found.items():
        dtype = variants.VARIANTS[name].dtype
        median = statistics.median(row["seconds"])
        over = _cell(ratios(found, USUAL.format(dtype), name))
        under = _cell(ratios(found, name, OURS.format(dtype)))
        lines.append(
            f"{name:<36}{1e3 * median:>9.4g}{1e3 * min(row['seconds']):>9.4g}"
            f"{batch / median:>11,.0f}{over:>24}{under:>24}"
        )
    lines += [f"not run: {name}: {reason}" for name, reason in result["not_run"].items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Prints the table, and writes everything measured to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20", help="resnet<6n+2>")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--platform", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--variants", default="*", help="patterns of names, separated by commas")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="about, of a turn")
    parser.add_argument("--steps", type=int, default=0, help="instead, steps of a turn at least")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for any one answer")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        variants.depth_of(args.model)
    except ValueError as error:
        parser.error(str(error))
    patterns = args.variants.split(",")
    names = [n for n in variants.VARIANTS if any(fnmatch.fnmatch(n, p) for p in patterns)]
    if not names:
        parser.error(f"--variants={args.variants} is none of {', '.join(variants.VARIANTS)}")
    if args.rounds < 1 or args.batch < 1:
        parser.error(f"--rounds={args.rounds} and --batch={args.batch} must be above 0")
    result = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "model": args.model,
        "batch": args.batch,
        "platform": args.platform,
        **measure(
            names,
            model=args.model,
            batch=args.batch,
            platform=args.platform,
            rounds=args.rounds,
            seconds=args.seconds,
            steps=args.steps,
            timeout=args.timeout,
        ),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.model}, batch {args.batch}, {args.platform}, {args.rounds} rounds")
    for row in result["variants"].values():
        if "hardware" in row["about"]:
            about = row["about"]
            print(f"{about['hardware']}; commit {about['commit']}; {about['versions']}")
            break
    print(table(result, args.batch))


if __name__ == "__main__":
    main()
