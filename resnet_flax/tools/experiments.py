"""The papers' experiments on CIFAR-10 as lists of runs, and how far each run is."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import runpy
import sys
from collections.abc import Mapping
from typing import IO

from ml_collections import ConfigDict
from tqdm import tqdm

from resnet_flax import commands, locks, models
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

# The rows of each table. A row is a net; "-B", "-C" and "-bias0" change a key of its config, and
# "modern-" takes another config.
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
    known = [*EXPERIMENTS, "all"]
    if experiment not in known:
        raise UserError(f"unknown experiment {experiment!r}; known: {', '.join(known)}")
    chosen = EXPERIMENTS.values() if experiment == "all" else [EXPERIMENTS[experiment]]
    rows = dict.fromkeys(itertools.chain(*chosen))
    return [row for row in rows if with_1202 or row != "resnet1202"]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One row with one seed."""

    row: str
    directory: pathlib.Path  # WORKDIR/<row>/seed<k>
    config: ConfigDict
    flags: tuple[str, ...]  # of `resnet_flax.main`, without --workdir

    @property
    def name(self) -> str:
        """For example "resnet20-B/seed0"."""
        return f"{self.row}/{self.directory.name}"

    def command(self, seeds: int = 1) -> list[str]:
        """Trains the run and, in the same process, the next `seeds` - 1."""
        more = [f"--workdir={self.directory}"]
        if seeds > 1:
            more = [f"--config.train.num_seeds={seeds}", f"--workdir={self.directory.parent}"]
        return ["python", "-m", "resnet_flax.main", *self.flags, *more]

    def result(self) -> dict | None:
        """The content of result.json if the run is finished.

        Raises:
          UserError: the directory belongs to a run of another configuration.
        """
        directory = Directory(self.directory)
        directory.check_config(flatten(self.config))
        return directory.finished(self.config.train.total_steps)

    def last_step(self) -> int:
        """The last step in the log, 0 before there is one."""
        records = metrics.read_records(self.directory / "metrics.jsonl")
        return records[-1]["step"] if records else 0

    def is_running(self) -> bool:
        """Whether a process holds the directory."""
        with contextlib.suppress(OSError), open(self.directory / ".lock", "r+") as file:
            return not lock(file)
        return False

    def cost(self) -> int:
        """Layers times training examples."""
        examples = self.config.train.total_steps * self.config.data.batch_size
        return models.get_architecture(self.config.model.name).weighted_layers * examples


def make_runs(
    rows: list[str],
    workdir: pathlib.Path,
    *,
    seeds: int,
    scale: float = 1.0,
    overrides: Mapping[str, str],
) -> list[Run]:
    """All rows with seed 0, then all with seed 1, up to `seeds` of them.

    `overrides` are values by flat key, as text; the durations they leave alone are `scaled`.

    Raises:
      UserError: an override or the scale makes no sense.
    """
    for key in {"seed", "model.name", "train.num_seeds"} & overrides.keys():
        raise UserError(f"--config.{key} is the experiment's own to choose; leave it out")
    for key in {"train.total_epochs", "train.total_examples"} & overrides.keys():
        raise UserError(f"--config.{key}: experiments count in steps; give train.total_steps")
    runs = []
    for seed, row in itertools.product(range(seeds), rows):
        file, net, changes = _config_of(row)
        config = runpy.run_path(str(file))["get_config"](net)
        changes |= scaled(config, scale) | overrides | {"seed": str(seed)}
        override(config, changes)
        validate(config)
        flags = f"--config={file}:{net}", *(f"--config.{key}={v}" for key, v in changes.items())
        runs.append(Run(row, workdir / row / f"seed{seed}", config, flags))
    return runs


def _config_of(row: str) -> tuple[pathlib.Path, str, dict[str, str]]:
    # The file, the net that it takes as its argument, and changed keys.
    folder = commands.configs()
    if folder.parent == pathlib.Path.cwd().resolve():
        folder = pathlib.Path(folder.name)
    net, _, option = row.removeprefix("modern-").partition("-")
    if row.startswith("modern-"):
        name = "modern"
    else:
        is_variant = net.startswith(("resnet110_", "resnet164_"))
        name = "identity_mappings" if is_variant else "paper"
    changes = {"bias0": {"model.gate_bias": "0"}, "": {}}.get(option, {"model.shortcut": option})
    return folder / f"{name}.py", net, changes


def scaled(config: ConfigDict, scale: float) -> dict[str, str]:
    """The values, as text by flat key, that multiply every duration of a run by `scale`.

    Durations are at least one step, and boundaries still rise. Evaluations and checkpoints stay at
    least 50 steps or a quarter of the run apart.
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale={scale:g} must be above 0 and at most 1")
    if scale == 1:
        return {}
    total = max(1, round(scale * config.train.total_steps))
    changes = {}
    for key, value in flatten(config).items():
        if key.endswith("_steps") and value:
            is_rare = key in ("eval.every_steps", "checkpoint.every_steps")
            least = max(1, min(50, total // 4)) if is_rare else 1
            steps = value if isinstance(value, tuple) else (value,)
            shorter = (min(total, max(least, round(scale * step))) for step in steps)
            rising = itertools.accumulate(shorter, lambda before, step: max(before + 1, step))
            changes[key] = ",".join(map(str, rising))
    return changes


def plan(runs: list[Run], results: Mapping[str, dict], jobs: int) -> tuple[dict[str, str], str]:
    """How far each run is, by name, and a line on all of them, with the time left.

    Times are estimated from `results`, of finished runs by name: from the same row if there are
    any, else from all rows and their depths. `jobs` runs are made side by side.
    """
    finished = [run for run in runs if run.name in results]
    # Seeds in one program took their time together.
    seconds = {name: r["seconds"] / r.get("seeds_in_program", 1) for name, r in results.items()}
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
    return "time unknown" if math.isnan(seconds) else f"about {tqdm.format_interval(seconds)}"


def lock(file: IO) -> bool:
    """Holds a file until it is closed; False if another process does."""
    held = locks.hold(file)
    if held is None:
        note = "the file system has no locks: let one process at a time work here, or use --part"
        print(note, file=sys.stderr)
    return held is not False
