"""Memory of one training step of very deep nets, with and without `model.remat`.

    python tests/benchmarks/memory.py --batch=8

Each case runs in a process of its own: the package's own training step, compiled and run once on
one CPU device. "temporary" is what the compiled program says it needs beside its arguments and
results (`memory_analysis()`), which any backend can tell; "arguments" are the state (parameters,
statistics, momentum) and the data that lie on the device; "peak RSS" is the most memory that the
whole process ever had, compiler included. A process that gets above --most is ended.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

MODELS = ("resnet1202", "resnet1001_preact", "resnet1001_bottleneck")
# Of a process that ended itself.
TOO_MUCH = 75


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM` (its highest) of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def watch(most: int) -> None:
    """Ends the process when it has more than `most` bytes."""

    def look():
        while resident_bytes("VmRSS") < most:
            time.sleep(0.05)
        os._exit(TOO_MUCH)

    threading.Thread(target=look, daemon=True).start()


def measure(name: str, batch: int, remat: bool, scan: str) -> dict:
    """Compiles and runs one step."""
    from resnet_flax.devices import cpu
    from resnet_flax.tools import bench_worker

    cpu.keep_freed_memory()
    case = bench_worker.Case(
        name,
        batch,
        "float32",
        devices=1,
        examples=max(512, batch),
        eval_examples=1,
        overrides={"model.remat": str(remat), "model.scan": scan},
    )
    trainer = bench_worker.Trainer(bench_worker.make_experiment(case))
    analysis = trainer.compiled.memory_analysis()
    trainer.run(1)
    return {
        "temporary": analysis.temp_size_in_bytes,
        "arguments": analysis.argument_size_in_bytes,
        "peak": resident_bytes("VmHWM"),
        "loss": trainer.loss,
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--scan", default="auto", help="config.model.scan")
    parser.add_argument("--most", type=float, default=14, help="GB that a process may have")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--remat", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        watch(int(1e9 * args.most))
        print(json.dumps(measure(args.serve, args.batch, args.remat, args.scan)))
        return
    print(
        f"one training step, batch {args.batch}, float32, model.scan={args.scan}, one CPU device; "
        "MB of 1e6 bytes"
    )
    print(f"{'net':<24}{'remat':>6}{'temporary':>11}{'arguments':>11}{'peak RSS':>10}{'loss':>9}")
    for name in args.models.split(","):
        for remat in (False, True):
            command = [sys.executable, __file__, f"--serve={name}", f"--batch={args.batch}"]
            command += [f"--most={args.most}", f"--scan={args.scan}"]
            done = subprocess.run(
                [*command, *(["--remat"] if remat else [])],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                check=False,
            )
            row = f"{name:<24}{'yes' if remat else 'no':>6}"
            if done.returncode == TOO_MUCH:
                print(f"{row}  ended above {args.most:g} GB", flush=True)
                continue
            done.check_returncode()
            got = json.loads(done.stdout)
            sizes = [f"{got[key] / 1e6:.0f}" for key in ("temporary", "arguments", "peak")]
            print(f"{row}{sizes[0]:>11}{sizes[1]:>11}{sizes[2]:>10}{got['loss']:>9.3f}", flush=True)


if __name__ == "__main__":
    main()
