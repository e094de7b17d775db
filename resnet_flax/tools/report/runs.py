"""Runs as the report reads them."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from resnet_flax.config import OPERATIONAL_KEYS, base_config, flatten
from resnet_flax.errors import UserError, first_line
from resnet_flax.runs import files, metrics

# The paper's recipe, with JSON's types.
DEFAULTS: dict[str, Any] = json.loads(json.dumps(flatten(base_config())))

_NUMBER = int | float
# The types of what a run's files must hold.
_TYPES = {
    "config.json": {
        key: _NUMBER if isinstance(value, _NUMBER) else type(value)
        for key, value in DEFAULTS.items()
    },
    "run.json": {
        "model": str, "shortcut": str, "dtype": str, "parameters": int, "total_steps": int,
        "data": dict,
    },
    "result.json": {
        "test_error_last": _NUMBER, "test_error_at_best_validation": _NUMBER | None,
        "test_error_best_is_leakage": _NUMBER | None, "train_error_last": _NUMBER | None,
        "steps": int, "seconds": _NUMBER, "images_per_second": _NUMBER, "hardware": str | None,
        "versions": dict | None, "class_names": list | None,
    },
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
        return max((record["step"] for record in self.log), default=0)

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
    found: dict[pathlib.Path, pathlib.Path] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root} is no directory: give a run's, or one that holds runs")
        for path, folders, names in os.walk(root):
            folders.sort()
            if not _TYPES.keys().isdisjoint(names):
                folders.clear()
                found.setdefault(pathlib.Path(path).resolve(), pathlib.Path(path))
    runs, notes = [], []
    for directory in found.values():
        try:
            runs.append(_load(directory))
        except UserError as error:
            notes.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            notes.append(f"{directory} is damaged: {first_line(error)}; restore it from a copy")
    return runs, notes


def _load(directory: pathlib.Path) -> Run:
    config, info, result = (files.read_json(directory / name) for name in _TYPES)
    if config is None or info is None:
        raise UserError(f"{directory} holds no {'run' if config else 'config'}.json")
    config = DEFAULTS | config
    for name, content in zip(_TYPES, (config, info, result), strict=True):
        if content is not None:
            _check(name, content)
    if result and result["steps"] != info["total_steps"]:
        raise ValueError(f"result.json has {result['steps']} steps, not {info['total_steps']}")
    responses = files.read_json(directory / "responses.json") or {"layers": []}
    deviations = [float(layer["std"]) for layer in responses["layers"]]
    if not np.isfinite(deviations).all():
        raise ValueError("responses.json has a number that is not finite")
    log = metrics.read_records(directory / "metrics.jsonl")
    return Run(directory, config, info, result, log, _confusion(result or {}), deviations)


def _check(name: str, content: dict[str, Any]) -> None:
    for key, kind in _TYPES[name].items():
        value = content.get(key)
        low, high = (0, 1) if "_error_" in key else (-1e15, 1e15)
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
