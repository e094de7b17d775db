r"""Makes the runs behind the papers' tables on CIFAR-10.

    python -m resnet_flax.tools.reproduce table6 --seeds=5 --workdir=runs/paper
    python -m resnet_flax.tools.reproduce all --workdir=runs/paper --dry_run
    python -m resnet_flax.tools.reproduce plain --scale=0.01 --seeds=2 --workdir=runs/trial

Each is an ordinary run of resnet_flax.main, in `WORKDIR/<run>/seed<k>`, with its output in
`log.txt` there. Those that are done are skipped, interrupted ones go on, failed ones are reported
at the end. The same command started again, after whatever has ended it, goes on. Started several
times on one directory (with CUDA_VISIBLE_DEVICES=0, =1, ... on a machine of several GPUs; on
machines that share a file system with locks), each takes a share of the runs.

Experiments: table6 (ResNet-20 to 110), plain, options (shortcuts A, B, C), bottleneck, preact,
shortcuts and activations (Identity Mappings, Tables 1 and 2), modern, all.
"""

import pathlib
import sys
import time

from tqdm import tqdm

from resnet_flax.errors import UserError
from resnet_flax.grid.experiments import runs_of
from resnet_flax.grid.groups import together
from resnet_flax.grid.plan import Job, estimate, make_jobs, state_of
from resnet_flax.grid.runner import Runner
from resnet_flax.tools import entry
from resnet_flax.training import inputs

# Between lines of progress where there is no terminal, and between looks at the runs.
_SECONDS_BETWEEN_LINES, _SECONDS_BETWEEN_LOOKS = 60.0, 2.0


class _Progress:
    """One bar for all runs on a terminal, a line a minute elsewhere."""

    def __init__(self, jobs: list[Job]):
        self._jobs, self._works = jobs, [job.work for job in jobs]
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=100.0,
            disable=not self._terminal,
            dynamic_ncols=True,
            smoothing=0.0,
            bar_format="{percentage:.1f} %|{bar}| {elapsed}, {remaining} left  {postfix}",
        )
        self._start = self._last_line = time.monotonic()
        self._last_look, self._first = -_SECONDS_BETWEEN_LOOKS, -1.0

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def tick(self, runner: Runner) -> None:
        now = time.monotonic()
        if now - self._last_look < _SECONDS_BETWEEN_LOOKS:
            return
        self._last_look = now
        shares = {job.name: runner.share(job) for job in self._jobs}
        pairs = zip(self._jobs, self._works, strict=True)
        percent = sum(100 * shares[job.name] * work for job, work in pairs) / sum(self._works)
        if self._first < 0:
            self._first = self._bar.initial = self._bar.n = percent
            self._start = now
        running = ", ".join(f"{j.name} {100 * shares[j.name]:.0f} %" for j in runner.active)
        text = f"{len(runner.done)} of {sum(len(job.runs) for job in self._jobs)} done"
        text += f", {len(runner.failed)} failed" if runner.failed else ""
        text += f"; {running}" if running else ""
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.n = percent
            self._bar.refresh()
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            gained = percent - self._first
            left = (now - self._start) / gained * (100 - percent) if gained > 0 else None
            self.say(f"{percent:.1f} %, {_clock(left)} left; {text}")

    def close(self) -> None:
        self._bar.close()


def _clock(seconds: float | None) -> str:
    return "unknown time" if seconds is None else tqdm.format_interval(seconds)


def plan(jobs: list[Job], parallel: int) -> str:
    """What is to be done, a job a paragraph, with the time that it should take."""
    states = {job.name: state_of(job) for job in jobs}
    finished = [
        pair for job in jobs for pair in zip(job.runs, states[job.name].results, strict=False)
    ]
    lines, times = [], []
    count = left = 0
    for job in jobs:
        state = states[job.name]
        count += len(job.runs)
        if state.results:
            status = "done"
        elif state.refusal:
            status = f"cannot be made: {state.refusal}"
        else:
            left += len(job.runs)
            times.append(estimate(job, state, finished))
            of = f" of {job.steps}" if job.steps else ""
            begun = f"at step {state.step}{of}" if state.step else f"{job.steps or ''} steps to do"
            status = f"{begun.strip()}, {_about(times[-1])}"
        lines += [f"{job.name}: {status}", f"    {job.shown_command}"]
    total = None if None in times else sum(times) / parallel
    hint = "" if finished else " until a run here is done"
    lines.append(
        f"{count} runs, {len(finished)} done, {left} to do: {_about(total)}{hint} with "
        f"--jobs={parallel}"
    )
    return "\n".join(lines)


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "time unknown"
    return f"about {tqdm.format_interval(seconds)}"


def reproduce(jobs: list[Job], directory: pathlib.Path, *, parallel: int) -> Runner:
    """Makes all runs, with a bar or lines on standard error; see `Runner`."""
    progress = _Progress(jobs)
    try:
        runner = Runner(jobs, directory, parallel=parallel, say=progress.say, tick=progress.tick)
        runner.run()
    finally:
        progress.close()
    return runner


def _require_data(jobs: list[Job]) -> None:
    """Loads the data of unfinished runs, which prepares them: what is wrong with them is said once.

    Raises:
      UserError: see `inputs.load_data`.
    """
    keys = "name", "data_dir", "archive", "mirror"
    unfinished = [job.config for job in jobs if not state_of(job).results]
    for config in {tuple(c.data[key] for key in keys): c for c in unfinished}.values():
        inputs.load_data(config)


def _part(jobs: list[Job], text: str | None) -> list[Job]:
    if text is None:
        return jobs
    number, slash, parts = text.partition("/")
    if slash and number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts):
        return jobs[int(number) - 1 :: int(parts)]
    raise UserError(f"--part={text} must be like 1/4: the first of four parts")


def _parse(argv: list[str]):
    parser = entry.parser(__doc__)
    parser.add_argument("experiment", help="one of those above")
    parser.add_argument("--workdir", default="runs/paper", help="of all runs; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="of each net; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; default: 1")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten all runs, for a trial")
    parser.add_argument("--dry_run", action="store_true", help="say what there is to do")
    parser.add_argument("--with_1202", action="store_true", help="ResNet-1202 too")
    parser.add_argument("--data_dir", help="short for --config.data.data_dir")
    parser.add_argument(
        "--seeds_per_run",
        type=int,
        default=1,
        help="seeds of a net that one process trains at once (config.train.num_seeds); default: 1, "
        "since more do not pay yet, on a CPU or a GPU",
    )
    parser.add_argument("--part", help="I/N: only every N-th run, where there are no locks")
    parser.add_argument(
        "--config.KEY",
        dest="key",
        metavar="VALUE",
        help="any setting, for all runs: --config.a.b=1",
    )
    args, rest = parser.parse_known_args(argv)
    if args.key is not None:
        raise UserError("--config.KEY stands for a key, such as --config.data.split=45k/5k")
    unknown = [a for a in rest if not (a.startswith("--config.") and "=" in a)]
    if unknown:
        raise UserError(f"unrecognized argument {unknown[0]}; see --help")
    overrides = [item.removeprefix("--config.") for item in rest]
    if args.data_dir:
        overrides.append(f"data.data_dir={args.data_dir}")
    return args, tuple(overrides)


def main(argv: list[str]) -> None:
    """Makes, or lists, what the flags ask for."""
    args, overrides = _parse(argv)
    runs = runs_of(args.experiment, on_request=args.with_1202)
    if "://" in args.workdir:
        raise UserError(f"--workdir={args.workdir} must be a local directory")
    directory = pathlib.Path(args.workdir).expanduser()
    jobs = make_jobs(runs, directory, seeds=args.seeds, scale=args.scale, overrides=overrides)
    if args.part is None:
        jobs = together(jobs, args.seeds_per_run)
    elif args.seeds_per_run == 1:
        jobs = _part(jobs, args.part)
    else:
        raise UserError(
            f"--part={args.part} and --seeds_per_run={args.seeds_per_run} exclude each other: "
            "which seeds go together depends on what the others have begun"
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be at least 1")
    if args.dry_run:
        print(plan(jobs, args.jobs))
        return
    _require_data(jobs)
    finish(reproduce(jobs, directory, parallel=args.jobs), directory)


def finish(runner: Runner, directory: pathlib.Path) -> None:
    """Says how it all ended, and exits with a status: 0 only where all runs are done."""
    if runner.stop_signal:
        print("Stopped; all is saved. The same command goes on from there.")
        sys.exit(128 + runner.stop_signal)
    for name, reason in runner.failed.items():
        print(f"\n{name} failed: {reason}", file=sys.stderr)
    if runner.failed:
        print(f"\n{len(runner.done)} runs are done, {len(runner.failed)} failed", file=sys.stderr)
        sys.exit(1)
    print(
        f"All {len(runner.done)} runs are done. Next:\n"
        f"  python -m resnet_flax.tools.report {directory} --out={directory}/report"
    )


if __name__ == "__main__":
    entry.run(main)
