"""Runs as the report reads them, gathered into experiments: runs that differ only in the seed."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from resnet_flax import models
from resnet_flax.config import OPERATIONAL_KEYS
from resnet_flax.errors import UserError, first_line
from resnet_flax.runs import files, metrics
from resnet_flax.tools.report.recipe import DEFAULTS, describe

_NUMBER = int | float
# By file: the lowest number, and the types of what must be there.
_CHECKS = {
    "config.json": (-math.inf, {
        key: _NUMBER if isinstance(value, _NUMBER) else type(value)
        for key, value in DEFAULTS.items()
    }),
    "run.json": (1, {
        "model": str, "shortcut": str, "dtype": str, "parameters": int, "total_steps": int,
        "data": dict,
    }),
    "result.json": (0, {
        "test_error_last": _NUMBER, "test_error_at_best_validation": _NUMBER | None,
        "test_error_best_is_leakage": _NUMBER | None, "train_error_last": _NUMBER | None,
        "steps": int, "seconds": _NUMBER, "images_per_second": _NUMBER, "hardware": str | None,
        "versions": dict | None, "class_names": list | None,
    }),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left in its directory."""

    directory: pathlib.Path
    config: dict[str, Any]  # flat; keys that the run's version did not have hold their defaults
    info: dict[str, Any]  # run.json
    result: dict[str, Any] | None  # result.json; None: the run is unfinished
    log: list[dict[str, Any]]  # metrics.jsonl
    confusion: np.ndarray | None  # test images by (true, predicted) class; None for many classes
    responses: list[float]  # standard deviations by layer; empty: not measured

    @property
    def last_step(self) -> int:
        """The last step in the log."""
        return max((r["step"] for r in self.log), default=0)

    @property
    def key(self) -> str:
        """Equal for runs that differ only in the seed, however their options were given."""
        ignored = OPERATIONAL_KEYS | {"seed"}
        resolved = {"model.shortcut": self.info["shortcut"], "model.dtype": self.info["dtype"]}
        config = {k: v for k, v in self.config.items() if k not in ignored} | resolved
        others = self.info["data"].get("fingerprint"), self.info.get("init_weights")
        return json.dumps([config, self.info["total_steps"], *others], sort_keys=True)


def read(roots: list[pathlib.Path]) -> tuple[list[Run], list[str]]:
    """All runs below `roots`, each once, and what is wrong with those that cannot be read."""
    found, notes = {}, []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root} is no directory: give a run's, or one that holds runs")
        for path, folders, names in os.walk(root):
            folders.sort()
            if not _CHECKS.keys().isdisjoint(names):
                folders.clear()
                found.setdefault(pathlib.Path(path).resolve(), pathlib.Path(path))
    runs = []
    for directory in found.values():
        try:
            runs.append(_load(directory))
        except UserError as error:
            notes.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"{directory} is damaged: {first_line(error)}; restore it from a copy")
    return runs, notes


def _load(directory: pathlib.Path) -> Run:
    config, info, result = (files.read_json(directory / name) for name in _CHECKS)
    if config is None or info is None:
        raise UserError(f"{directory} holds no {'run' if config else 'config'}.json")
    config = DEFAULTS | config
    _check("config.json", config)
    _check("run.json", info)
    if result is not None:
        _check("result.json", result)
        if result["steps"] != info["total_steps"]:
            raise ValueError(f"result.json has {result['steps']} steps, not {info['total_steps']}")
    responses = files.read_json(directory / "responses.json") or {"layers": []}
    deviations = [float(layer["std"]) for layer in responses["layers"]]
    if not np.isfinite(deviations).all():
        raise ValueError("responses.json has a number that is not finite")
    log = metrics.read_records(directory / "metrics.jsonl")
    return Run(directory, config, info, result, log, _confusion(result or {}), deviations)


def _check(name: str, content: dict[str, Any]) -> None:
    low, kinds = _CHECKS[name]
    for key, kind in kinds.items():
        value, high = content.get(key), 1 if "_error_" in key else 1e15
        is_number = isinstance(value, _NUMBER)
        if not isinstance(value, kind) or (is_number and not low <= value <= high):
            raise ValueError(f"{name} has {key}={value!r}")


def _confusion(result: dict[str, Any]) -> np.ndarray | None:
    if not result.get("class_names") or result.get("test_confusion_last") is None:
        return None
    matrix, count = np.array(result["test_confusion_last"], float), len(result["class_names"])
    if matrix.ndim != 2 or not count <= len(matrix) == matrix.shape[1] or matrix.min() < 0:
        raise ValueError("result.json has a test_confusion_last of another shape")
    return matrix


class Experiment:
    """Runs that differ only in the seed, in order of the seed."""

    def __init__(self, runs: list[Run]):
        """Describes the runs by the first."""
        config, info = runs[0].config, runs[0].info
        self.model = _model(config, info)  # with its options, as in published.toml
        depth = re.match(r"[a-z]*(\d+)", self.model)
        self.depth = int(depth[1]) if depth else 0  # the number in the model's name
        self.parameters: int = info["parameters"]
        self.dtype: str = info["dtype"]
        self.data = str(info["data"].get("name"))
        self.steps: int = info["total_steps"]
        self.recipe = describe(config, info.get("init_weights"))
        self.finished = [run for run in runs if run.result]
        self.unfinished = [run for run in runs if not run.result]
        # Names of the classes; empty unless every finished run has a confusion matrix.
        self.classes: tuple[str, ...] = ()
        if self.finished and all(run.confusion is not None for run in self.finished):
            self.classes = tuple(map(str, self.finished[0].result["class_names"]))
        # Whether the runs belong beside the paper's, perhaps over fewer steps.
        self.is_comparable = self.data == "cifar10" and self.recipe.is_paper
        self.run_count = f"{len(self.finished)} run{'' if len(self.finished) == 1 else 's'}"

    @property
    def label(self) -> str:
        """A short name for legends and rows."""
        data = "" if self.data == "cifar10" else self.data
        recipe = "" if self.recipe.is_paper else "other recipe"
        steps = "" if self.recipe.is_full else f"{self.steps:,} steps"
        return ", ".join(filter(None, (self.model, data, recipe, steps)))

    def values(self, name: str, scale: float = 1) -> list[float]:
        """An entry of each finished run's result, times `scale`; empty if one lacks it."""
        values = [run.result.get(name) for run in self.finished]
        return [] if None in values else [scale * value for value in values]

    def class_errors(self) -> list[float]:
        """Test error of each class, %, mean over the runs; nan for a class without images."""
        matrices = np.array([run.confusion for run in self.finished])
        with np.errstate(invalid="ignore"):
            shares = matrices.diagonal(axis1=1, axis2=2) / matrices.sum(axis=2)
        return (100 * (1 - shares)).mean(axis=0)[: len(self.classes)].tolist()


def _model(config: dict[str, Any], info: dict[str, Any]) -> str:
    name, shortcut, bias = info["model"], info["shortcut"], config["model.gate_bias"]
    known = models.ARCHITECTURES.get(name)
    if shortcut in models.OPTIONS and shortcut != (known and known.shortcut):
        return f"{name}-{shortcut}"
    has_bias = "gating" in name and bias != DEFAULTS["model.gate_bias"]
    return f"{name}-bias{bias:g}" if has_bias else name


def gather(runs: list[Run]) -> tuple[list[Experiment], list[str]]:
    """Experiments in order of their models and lengths, and notes on runs left out.

    Of two runs with the same seed only one counts: they are not independent.
    """
    finished_first = sorted(runs, key=lambda run: not run.result)
    same = grouped(finished_first, lambda run: (run.key, run.config["seed"])).values()
    notes = [
        f"{run.directory} is left out: {kept.directory} is the same run with the same seed"
        for kept, *others in same
        for run in others
    ]
    by_seed = sorted((kept for kept, *_ in same), key=lambda run: run.config["seed"])
    experiments = map(Experiment, grouped(by_seed, lambda run: run.key).values())
    return sorted(experiments, key=_order), notes


def _order(e: Experiment):
    family = e.model.partition("_")[2], not e.model.startswith("resnet")
    return family, e.depth, e.model, not e.recipe.is_paper, -e.steps


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Lists of items with an equal key."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_classes(experiments: list[Experiment]) -> dict[tuple[str, ...], list[Experiment]]:
    """Experiments with confusion matrices, by the names of their classes."""
    return grouped((e for e in experiments if e.classes), lambda e: e.classes)
