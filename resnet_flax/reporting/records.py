"""What runs have left: read, checked, and grouped with those that differ only in the seed."""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from typing import Any

from resnet_flax import models
from resnet_flax.config import OPERATIONAL_KEYS, base_config, flatten
from resnet_flax.errors import UserError
from resnet_flax.reporting.recipe import Recipe, describe
from resnet_flax.runs import files, metrics

_FILES = ("config.json", "run.json", "result.json")
# Of a result: what must be a number from 0 to 1, or null where it may.
_ERRORS = {
    "test_error_last": False,
    "test_error_at_best_validation": True,
    "test_error_best_is_leakage": True,
    "train_error_last": True,
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
      directory: the run's.
      config: flat, with the defaults of keys that the run's version did not have.
      run: content of `run.json`.
      result: content of `result.json`; None: the run has not ended.
      metrics: records of `metrics.jsonl`.
      responses: standard deviations of its layers' responses, if they have been measured.
    """

    directory: pathlib.Path
    config: dict[str, Any]
    run: dict[str, Any]
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    responses: list[float] | None

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config["seed"]

    @property
    def last_step(self) -> int:
        """How far it has come."""
        return max((r["step"] for r in self.metrics), default=0)

    @property
    def key(self) -> str:
        """What it shares with the other runs of its group."""
        ignored = OPERATIONAL_KEYS | {"seed"}
        parts = {k: v for k, v in self.config.items() if k not in ignored}
        # What was left "auto" is resolved: it must not depend on how it was asked for.
        parts |= {"model.shortcut": self.run["shortcut"], "model.dtype": self.run["dtype"]}
        data = self.run["data"].get("fingerprint")
        more = [self.run["total_steps"], data, self.run.get("init_weights")]
        return json.dumps([parts, more], sort_keys=True)


def find(roots: list[pathlib.Path]) -> list[pathlib.Path]:
    """The directories of all runs below `roots`, in order, each once.

    Raises:
      UserError: a root does not exist.
    """
    found = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root} is no directory: give a run's, or one that holds runs")
        for path, folders, names in os.walk(root):
            folders.sort()
            if any(name in names for name in _FILES):
                found.setdefault(pathlib.Path(path).resolve(), pathlib.Path(path))
                folders.clear()
    return list(found.values())


def load(directory: pathlib.Path) -> Record:
    """Reads a run.

    Raises:
      UserError: a file is missing or damaged.
    """
    read = {name: files.read_json(directory / name) for name in _FILES}
    for name in _FILES[:2]:
        if read[name] is None:
            raise UserError(f"{directory} holds no {name}")
    config = json.loads(json.dumps(flatten(base_config()))) | read["config.json"]
    record = Record(
        directory,
        config,
        read["run.json"],
        read["result.json"],
        metrics.read_records(directory / "metrics.jsonl"),
        _responses(directory),
    )
    try:
        _check(record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{directory} holds damaged records: {error}") from error
    return record


def _check(record: Record) -> None:
    known = flatten(base_config())
    for key, value in record.config.items():
        default = known.get(key)
        if isinstance(default, (bool, int, float)) and not isinstance(value, (int, float)):
            raise TypeError(f"config.json has {key}={value!r}")
        if isinstance(default, str) and not isinstance(value, str):
            raise TypeError(f"config.json has {key}={value!r}")
    run, result = record.run, record.result
    for name, kind in (("model", str), ("shortcut", str), ("dtype", str), ("total_steps", int),
                       ("parameters", int), ("data", dict)):  # fmt: skip
        if not isinstance(run[name], kind):
            raise TypeError(f"run.json has {name}={run[name]!r}")
    if run["total_steps"] < 1 or run["parameters"] < 1:
        raise ValueError("run.json has a length or a size below 1")
    if result is None:
        return
    if result["steps"] != run["total_steps"]:
        raise ValueError(f"result.json is of {result['steps']} steps, not {run['total_steps']}")
    for name, may_lack in _ERRORS.items():
        value = result.get(name)
        if not (value is None and may_lack) and not 0 <= value <= 1:
            raise ValueError(f"result.json has {name}={value!r}")
    for name in ("seconds", "images_per_second"):
        if not 0 <= result[name] < math.inf:
            raise ValueError(f"result.json has {name}={result[name]!r}")
    names, matrix = result.get("class_names") or [], result.get("test_confusion_last")
    if not isinstance(names, list) or not isinstance(result.get("hardware"), (str, type(None))):
        raise TypeError("result.json has class names or hardware of another type")
    if matrix is not None and (
        len(matrix) < len(names) or any(sum(row) < 0 or len(row) != len(matrix) for row in matrix)
    ):
        raise ValueError("result.json has a confusion matrix of another shape")


def _responses(directory: pathlib.Path) -> list[float] | None:
    content = files.read_json(directory / "responses.json")
    if content is None:
        return None
    try:
        values = [float(layer["std"]) for layer in content["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'responses.json'} is damaged: {error!r}") from error
    if not values or not all(math.isfinite(v) for v in values):
        raise UserError(f"{directory / 'responses.json'} is damaged: no finite numbers")
    return values


@dataclasses.dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of n numbers; the deviation of one is nan."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Statistic | None":
        """Of nothing: None."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), deviation, len(values))


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
      finished: by seed.
      unfinished: likewise.
    """

    finished: tuple[Record, ...]
    unfinished: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """Any of them."""
        return (self.finished + self.unfinished)[0]

    @property
    def net(self) -> str:
        """Name of the net, see `published`."""
        config, run = self.first.config, self.first.run
        name, gates = run["model"], "gating" in run["model"]
        # The shortcut of a net that leaves no choice goes without saying.
        known = models.ARCHITECTURES.get(name)
        if run["shortcut"] in models.OPTIONS and run["shortcut"] != (known and known.shortcut):
            name += f"-{run['shortcut']}"
        if gates and config["model.gate_bias"] != -6:
            name += f"-bias{config['model.gate_bias']:g}"
        return name

    @property
    def recipe(self) -> Recipe:
        """How they were trained."""
        return describe(self.first.config, self.first.run["total_steps"])

    @property
    def data(self) -> str:
        """Name of the data set."""
        return str(self.first.run["data"].get("name"))

    def statistic(self, name: str, scale: float = 1.0) -> Statistic | None:
        """Of an entry of the results, times `scale`; None where a run lacks it."""
        values = [record.result.get(name) for record in self.finished]
        return None if None in values else Statistic.of([scale * v for v in values])


def group(records: list[Record]) -> tuple[list[Group], list[str]]:
    """Groups in order of their nets and lengths, and what had to be left out.

    Of two runs of a group with the same seed only the first counts: they are not independent.
    """
    by_key: dict[str, dict[int, Record]] = {}
    notes = []
    for record in records:
        members = by_key.setdefault(record.key, {})
        other = members.get(record.seed)
        if other is None or (other.result is None and record.result is not None):
            members[record.seed] = record
        if other is not None:
            kept = members[record.seed]
            left = other if kept is record else record
            notes.append(
                f"{left.directory} is left out: {kept.directory} is the same run with the same seed"
            )
    groups = []
    for members in by_key.values():
        ordered = [members[seed] for seed in sorted(members)]
        finished = tuple(r for r in ordered if r.result is not None)
        groups.append(Group(finished, tuple(r for r in ordered if r.result is None)))
    return sorted(groups, key=_order), notes


def _order(group: Group):
    name = group.first.run["model"]
    digits = "".join(c for c in name.partition("_")[0] if c.isdigit())
    family = name.partition("_")[2], not name.startswith("resnet")
    return family, int(digits or 0), group.net, not group.recipe.is_paper, -group.recipe.steps
