"""From runs to jobs: command lines, and how far each one has come."""

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import sys
import warnings
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import resnet_flax
from resnet_flax import models
from resnet_flax.config import flatten, nearest_key, override
from resnet_flax.errors import UserError
from resnet_flax.grid.durations import scaled
from resnet_flax.grid.experiments import Run
from resnet_flax.models import count
from resnet_flax.runs import files, identity
from resnet_flax.validation import validate

# What tells the runs of a grid apart is not for everybody to override.
_FIXED = ("seed", "model.name", "train.num_seeds")
# Enough of the end of a metrics.jsonl to hold a record.
_TAIL_BYTES = 8192


@dataclasses.dataclass(frozen=True)
class Job:
    """An ordinary run, to be made by a process of its own; or several seeds of one, see `groups`.

    Attributes:
      name: "resnet20/seed0"; of several seeds "resnet20/seeds0-3".
      directory: its `--workdir`.
      config: its whole configuration; of several seeds that of the first.
      flags: what follows `python -m resnet_flax.main`.
      members: of several seeds, the job of each.
    """

    name: str
    directory: pathlib.Path
    config: ConfigDict
    flags: tuple[str, ...]
    members: tuple["Job", ...] = ()

    @property
    def runs(self) -> tuple["Job", ...]:
        """The runs that it makes, each as a job of its own."""
        return self.members or (self,)

    @property
    def log(self) -> pathlib.Path:
        """Where the output of its process goes."""
        name = f"{self.name.rpartition('/')[2]}.log" if self.members else "log.txt"
        return self.directory / name

    @property
    def command(self) -> list[str]:
        """Argument list of the process."""
        return [sys.executable, "-m", "resnet_flax.main", *self.flags]

    @property
    def shown_command(self) -> str:
        """The same, to be pasted into a shell."""
        return shlex.join(["python", *self.command[1:]])

    @property
    def steps(self) -> int | None:
        """Length of the run; None where it is given in epochs or examples."""
        train = self.config.train
        return None if train.total_epochs or train.total_examples else train.total_steps

    @property
    def work(self) -> float:
        """What the run costs, in multiply-adds of a forward pass over all its examples."""
        examples = (self.steps or 1) * self.config.data.batch_size * len(self.runs)
        return float(_multiply_adds(self.config.model.name)) * examples


@functools.cache
def _multiply_adds(name: str) -> int:
    size = models.get_architecture(name).image_size
    return sum(row.multiply_adds for row in count.layers(models.create_model(name), size))


def make_jobs(
    runs: tuple[Run, ...],
    directory: pathlib.Path,
    *,
    seeds: int,
    scale: float = 1.0,
    overrides: tuple[str, ...] = (),
) -> list[Job]:
    """All runs with all seeds, one seed after the other.

    Args:
      runs: each is made with every seed.
      directory: of the grid; the run `name` with seed k lies in `name/seed<k>`.
      seeds: how many, from 0.
      scale: multiplies all durations but those in `overrides`, see `durations.scaled`.
      overrides: "key=value", for all runs.

    Raises:
      UserError: an override that makes no sense, or a config file that is not there.
    """
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1")
    for item in overrides:
        key = item.partition("=")[0]
        if key in _FIXED:
            raise UserError(f"--config.{key} is the experiment's own to choose; leave it out")
    jobs = []
    for seed in range(seeds):
        for run in runs:
            given = [*run.overrides, *overrides, f"seed={seed}"]
            config = load_config(run.config, given)
            changes = scaled(config, scale, [item.partition("=")[0] for item in overrides])
            given += [f"{k}={_as_flag(v)}" for k, v in changes.items()]
            config = load_config(run.config, given)
            own = directory / run.name / f"seed{seed}"
            line = [f"--config={_config_path(run.config)}", f"--workdir={own}"]
            line += [f"--config.{item}" for item in given]
            jobs.append(Job(f"{run.name}/seed{seed}", own, config, tuple(line)))
    return jobs


def _as_flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _config_path(name: str) -> str:
    """Path of a file of `configs/`, with its argument, as short as can be."""
    root = pathlib.Path(resnet_flax.__file__).resolve().parent.parent
    path = root / "configs" / name
    if not path.with_name(name.partition(":")[0]).is_file():
        raise UserError(
            f"{path.parent} has no {name.partition(':')[0]}: experiments need the project's "
            "configs/, so install it from a clone, with pip install -e"
        )
    here = pathlib.Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def load_config(name: str, overrides: list[str]) -> ConfigDict:
    """The configuration that `resnet_flax.main` makes of a file of `configs/` and overrides.

    Raises:
      UserError: there is no such key, or a value makes no sense.
    """
    config = _read_config(f"--config={_config_path(name)}")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--config.{item} lacks its value: write --config.{key}=VALUE")
        if key not in flatten(config):
            near = nearest_key(key)
            hint = f" (did you mean --config.{near}?)" if near else ""
            raise UserError(f"--config.{key} is no config key{hint}")
        override(config, {key: text})
    validate(config)
    return config


def _read_config(flag: str) -> ConfigDict:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[flag])
    try:
        with warnings.catch_warnings():
            # ml_collections loads files in a way that Python deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            values(["", flag])
        return values["config"].value
    except Exception as error:
        # A config file is Python: it can fail in any way.
        first = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"the configuration is wrong: {type(error).__name__}: {first}") from error


@dataclasses.dataclass(frozen=True)
class State:
    """How far a job has come.

    Attributes:
      step: last step on record.
      total: length of the run, where it is known.
      results: what the `result.json` of each of its runs holds, where all are done.
      refusal: why the directory cannot be used, or "".
    """

    step: int = 0
    total: int | None = None
    results: tuple[dict[str, Any], ...] = ()
    refusal: str = ""

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        return 1.0 if self.results else min(1.0, self.step / self.total) if self.total else 0.0


def state_of(job: Job) -> State:
    """What the files in a job's directory say."""
    if job.members:
        states = [state_of(member) for member in job.members]
        return State(
            min(state.step for state in states),
            states[0].total,
            sum((s.results for s in states), ()) if all(s.results for s in states) else (),
            next((state.refusal for state in states if state.refusal), ""),
        )
    try:
        identity.check_same_config(job.directory, job.config)
        run = files.read_json(job.directory / "run.json") or {}
        total = job.steps or run.get("total_steps")
        try:
            result = files.read_json(job.directory / "result.json") or {}
        except UserError:
            result = {}  # The run makes it again from its last checkpoint.
        done = total is not None and result.get("steps") == total
        weights = job.directory / "weights.safetensors"
        done = done and weights.is_file() and isinstance(result.get("test_error_last"), float)
        return State(last_step(job.directory), total, (result,) if done else ())
    except UserError as error:
        return State(refusal=str(error))


def last_step(directory: pathlib.Path) -> int:
    """Step of the last whole record of a run that may be going on; 0 where there is none."""
    try:
        with open(directory / "metrics.jsonl", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def estimate(job: Job, state: State, finished: list[tuple[Job, dict[str, Any]]]) -> float | None:
    """Seconds that are left of a job, going by finished runs; None where there are none.

    The same net's runs are the measure where there are any, else all, by their multiply-adds.
    """
    timed = [
        # What took a while for several nets together took each a part of it.
        (other, float(result["seconds"]) / result.get("seeds_in_program", 1))
        for other, result in finished
        if isinstance(result.get("seconds"), (int, float)) and result["seconds"] > 0
    ]
    name = job.name.rpartition("/")[0]
    same = [pair for pair in timed if pair[0].name.rpartition("/")[0] == name]
    measure = same or timed
    work = sum(other.work for other, _ in measure)
    if not work:
        return None
    return (1 - state.share) * job.work * sum(seconds for _, seconds in measure) / work
