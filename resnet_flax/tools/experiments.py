"""The papers' experiments on CIFAR-10 as lists of runs, and how far each run is."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import runpy
import sys
from collections.abc import Iterable, Mapping
from typing import IO

from ml_collections import ConfigDict
from tqdm import tqdm

import resnet_flax
from resnet_flax import locks, models
from resnet_flax.config import flatten, override, validate
from resnet_flax.errors import UserError
from resnet_flax.runs import metrics
from resnet_flax.runs.directory import Directory

_DEPTHS = 20, 32, 44, 56, 110
_SHORTCUTS = (
    "constant_scaling", "exclusive_gating", "shortcut_gating-bias0", "shortcut_gating",
    "conv_shortcut", "dropout_shortcut",
)  # fmt: skip
_ACTIVATIONS = "bn_after_addition", "relu_before_addition", "relu_only_preact", "preact"

# The rows of each table. A row is a net with its own config; "-B", "-C" and "-bias0" change a key
# of it, "modern-" takes configs/modern.py.
EXPERIMENTS: dict[str, list[str]] = {
    # [R, Table 6 and Fig. 6 middle]
    "table6": [f"resnet{depth}" for depth in (*_DEPTHS, 1202)],
    # [R, Fig. 6 left]
    "plain": [f"plain{depth}" for depth in _DEPTHS],
    # [R, Table 3] compares them on ImageNet. A is the nets' own.
    "options": [net + option for net in ("resnet20", "resnet56") for option in ("", "-B", "-C")],
    # [R, Fig. 5 right] on CIFAR-10: ResNet-164 as [I, Table 3] trains it.
    "bottleneck": ["resnet47_bottleneck", "resnet164_bottleneck"],
    # [I, Table 3]
    "preact": ["resnet110", "resnet110_preact", "resnet164_bottleneck", "resnet164_preact"],
    # [I, Tables 1 and 2]
    "shortcuts": ["resnet110", *(f"resnet110_{kind}" for kind in _SHORTCUTS)],
    "activations": ["resnet110", *(f"resnet110_{kind}" for kind in _ACTIVATIONS)],
    # The nets of Table 6 with later training habits.
    "modern": [f"modern-resnet{depth}" for depth in _DEPTHS],
}


def rows_of(experiment: str, *, with_1202: bool = False) -> list[str]:
    """The rows of an experiment, or of "all", each once; ResNet-1202 only where asked for."""
    if experiment not in (*EXPERIMENTS, "all"):
        known = ", ".join([*EXPERIMENTS, "all"])
        raise UserError(f"unknown experiment {experiment!r}; known: {known}")
    chosen = EXPERIMENTS.values() if experiment == "all" else [EXPERIMENTS[experiment]]
    rows = dict.fromkeys(itertools.chain(*chosen))
    return [row for row in rows if with_1202 or row != "resnet1202"]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed."""

    row: str
    directory: pathlib.Path  # WORKDIR/<row>/seed<k>
    config: ConfigDict
    flags: tuple[str, ...]  # of `resnet_flax.main`, --config first, without --workdir

    @property
    def name(self) -> str:
        """For example "resnet20-B/seed0"."""
        return f"{self.row}/{self.directory.name}"

    def command(self, seeds: int = 1) -> list[str]:
        """Trains the run and, in the same process, the next `seeds` - 1."""
        place = self.directory if seeds == 1 else self.directory.parent
        several = [f"--config.train.num_seeds={seeds}"] if seeds > 1 else []
        file, *settings = self.flags
        return ["python", "-m", "resnet_flax.main", file, f"--workdir={place}", *settings, *several]

    def result(self) -> dict | None:
        """What result.json holds if the run is finished.

        Raises:
          UserError: the directory belongs to a run of another configuration.
        """
        directory = Directory(self.directory)
        directory.check_config(flatten(self.config))
        return directory.finished(self.config.train.total_steps)

    def last_step(self) -> int:
        """Step of the last record, 0 where there is none."""
        records = metrics.read_records(self.directory / "metrics.jsonl")
        return records[-1]["step"] if records else 0

    def is_running(self) -> bool:
        """Whether a process holds its directory."""
        with contextlib.suppress(OSError), open(self.directory / ".lock", "r+") as file:
            return not lock(file)
        return False

    def cost(self) -> int:
        """Layers times training examples."""
        examples = self.config.train.total_steps * self.config.data.batch_size
        return models.get_architecture(self.config.model.name).weighted_layers * examples


def make_runs(
    rows: Iterable[str],
    workdir: pathlib.Path,
    *,
    seeds: int,
    scale: float = 1.0,
    overrides: Mapping[str, str],
) -> list[Run]:
    """All rows with seed 0, then all with seed 1, up to `seeds` of them.

    `scale` shortens all durations that are not in `overrides`, see `scaled`.

    Raises:
      UserError: an override or the scale makes no sense, or there is no `configs/`.
    """
    for key in {"seed", "model.name", "train.num_seeds"} & overrides.keys():
        raise UserError(f"--config.{key} is the experiment's own to choose; leave it out")
    for key in {"train.total_epochs", "train.total_examples"} & overrides.keys():
        raise UserError(f"--config.{key}: experiments count in steps; give train.total_steps")
    runs = []
    for row in rows:
        path, argument, settings = _config_of(row)
        config = runpy.run_path(str(path))["get_config"](*argument)
        settings |= scaled(config, scale) | overrides
        override(config, settings)
        validate(config)
        here = pathlib.Path.cwd().resolve()
        path = path.relative_to(here) if path.is_relative_to(here) else path
        file = ":".join([f"--config={path}", *argument])
        for seed in range(seeds):
            own = config.copy_and_resolve_references()
            own.seed = seed
            flags = [f"--config.{key}={value}" for key, value in settings.items()]
            directory = workdir / row / f"seed{seed}"
            runs.append(Run(row, directory, own, (file, *flags, f"--config.seed={seed}")))
    return sorted(runs, key=lambda run: run.config.seed)


def _config_of(row: str) -> tuple[pathlib.Path, list[str], dict[str, str]]:
    # The file, its argument if it takes one, and changes of it.
    folder = pathlib.Path(resnet_flax.__file__).resolve().parent.parent / "configs"
    if not folder.is_dir():
        raise UserError(f"there is no {folder}: install the project from a clone (pip install -e)")
    net, _, option = row.removeprefix("modern-").partition("-")
    if row.startswith("modern-"):
        file = "modern"
    elif net.startswith(("resnet110_", "resnet164_")):
        file = "identity_mappings"
    else:
        file = net if (folder / f"{net}.py").exists() else "paper"
    changes = {"model.gate_bias": "0"} if option == "bias0" else {"model.shortcut": option}
    return folder / f"{file}.py", [net] if file != net else [], changes if option else {}


def scaled(config: ConfigDict, scale: float) -> dict[str, str]:
    """The values, as text by flat key, that multiply every duration of a run by `scale`.

    Durations are at least one step, and boundaries still rise. Evaluations and checkpoints stay at
    least 50 steps or a quarter of the run apart.
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale={scale:g} must be above 0 and at most 1")
    if scale == 1:
        return {}

    def shorten(steps: int) -> int:
        return max(1, round(steps * scale))

    total = shorten(config.train.total_steps)
    changes: dict[str, str] = {}
    for key, value in flatten(config).items():
        if not key.endswith("_steps") or not value:
            continue
        if isinstance(value, tuple):
            rising = itertools.accumulate(map(shorten, value), lambda a, b: max(a + 1, b))
            changes[key] = ",".join(map(str, rising))
        elif key.endswith(".every_steps"):
            least = 1 if key == "log.every_steps" else max(1, min(50, total // 4))
            changes[key] = str(min(total, max(shorten(value), least)))
        else:
            changes[key] = str(shorten(value))
    return changes


def plan(runs: list[Run], results: dict[str, dict], jobs: int) -> tuple[dict[str, str], str]:
    """How far each run is, by name, and a line on all of them, with the time left.

    Times are estimated from `results`, of finished runs by name: from the same row if there are
    any, else from all rows and their depths. `jobs` runs are made side by side.
    """
    # Seeds in one program took their time together.
    seconds = {name: r["seconds"] / r.get("seeds_in_program", 1) for name, r in results.items()}
    finished = [run for run in runs if run.name in results]
    status, times = {}, []
    for run in runs:
        if run.name in results:
            status[run.name] = "done"
            continue
        alike = [other for other in finished if other.row == run.row] or finished
        cost = sum(other.cost() for other in alike)
        rate = sum(seconds[other.name] for other in alike) / cost if cost else math.nan
        step, total = run.last_step(), run.config.train.total_steps
        times.append((1 - min(step, total) / total) * run.cost() * rate)
        running = "running, " if run.is_running() else ""
        far = f"at step {step} of {total}" if step else f"{total} steps to do"
        status[run.name] = f"{running}{far}, {_about(times[-1])}"
    hint = "" if results else " until a run here is done"
    count = f"{len(runs)} runs, {len(finished)} done, {len(times)} to do"
    return status, f"{count}: {_about(sum(times) / jobs)}{hint} with --jobs={jobs}"


def _about(seconds: float) -> str:
    if math.isnan(seconds):
        return "time unknown"
    return f"about {tqdm.format_interval(seconds)}"


def lock(file: IO) -> bool:
    """Holds a file until it is closed; False if another process does."""
    held = locks.hold(file)
    if held is None:
        note = "the file system has no locks: let one process at a time work here, or use --part"
        print(note, file=sys.stderr)
    return held is not False
