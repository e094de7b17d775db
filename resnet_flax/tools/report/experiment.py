"""Experiments, the runs that differ only in the seed, and what sets their recipe apart."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from resnet_flax import models
from resnet_flax.config import OPERATIONAL_KEYS
from resnet_flax.tools.report.published import PAPER_STEPS
from resnet_flax.tools.report.runs import DEFAULTS, Run

# Part of the model, shown elsewhere in the report, or without effect on what is learned.
_NOT_RECIPE = OPERATIONAL_KEYS | {
    "seed", "model.name", "model.shortcut", "model.gate_bias", "model.num_classes", "model.scan",
    "model.remat", "model.dtype", "data.name", "data.split", "data.max_unreadable",
    "optim.warmup_steps", "optim.warmup_error", "optim.warmup_rate", "optim.warmup_linear",
}  # fmt: skip


class Experiment:
    """Runs that differ only in the seed, in order of the seed."""

    def __init__(self, runs: list[Run]):
        """Describes the runs by the first."""
        config, info = runs[0].config, runs[0].info
        self.finished = [run for run in runs if run.result]
        self.unfinished = [run for run in runs if not run.result]
        self.run_count = f"{len(self.finished)} run{'' if len(self.finished) == 1 else 's'}"
        self.model = _model(config, info)  # with its options, as in published.toml
        depth = re.match(r"[a-z]*(\d+)", self.model)
        self.depth = int(depth[1]) if depth else 0  # the number in the model's name
        self.parameters: int = info["parameters"]
        self.dtype: str = info["dtype"]
        self.data = str(info["data"].get("name"))
        self.steps: int = info["total_steps"]

        changed = _changed(config)
        self.is_full = not changed  # the paper's recipe, for all its steps
        self.is_paper = changed.keys() <= {"train.total_steps", "optim.boundaries_steps"}
        # Whether the test error belongs beside the paper's, perhaps of fewer steps.
        self.is_comparable = self.is_paper and self.data == "cifar10"
        changed.pop("train.total_steps", None)
        settings = sorted(f"{key.partition('.')[2]}={value}" for key, value in changed.items())
        self.settings = "paper's" if self.is_paper else "; ".join(settings)
        self.remarks = _remarks(config, info)  # what a reader of the error must know
        self.recipe = commas(self.settings, _warmup(config), self.remarks)
        self.length = f"{self.steps:,}"  # "640 of 64,000" of a shortened run
        if self.is_paper and self.steps != PAPER_STEPS:
            self.length += f" of {PAPER_STEPS:,}"
        self.difference = commas(
            "" if self.is_paper else "other recipe", "" if self.is_full else f"{self.steps:,} steps"
        )
        data = "" if self.data == "cifar10" else self.data
        self.label = commas(self.model, data, self.difference)  # of legends and rows

    def values(self, name: str) -> list[float]:
        """An entry of each finished run's result; empty if one lacks it."""
        values = [run.result.get(name) for run in self.finished]
        return [] if None in values else values

    def class_errors(self) -> list[float]:
        """Test error of each class, %, mean over the runs; nan for a class without images."""
        matrices = np.array([run.confusion for run in self.finished])
        with np.errstate(invalid="ignore"):
            shares = matrices.diagonal(axis1=1, axis2=2) / matrices.sum(axis=2)
        count = len(self.finished[0].result["class_names"])
        return (100 * (1 - shares)).mean(axis=0)[:count].tolist()


def commas(*texts: str) -> str:
    """The texts that are not empty, with commas between them."""
    return ", ".join(filter(None, texts))


def _model(config: dict[str, Any], info: dict[str, Any]) -> str:
    name, shortcut, bias = info["model"], info["shortcut"], config["model.gate_bias"]
    known = models.ARCHITECTURES.get(name)
    if shortcut in models.OPTIONS and shortcut != (known and known.shortcut):
        return f"{name}-{shortcut}"
    has_bias = "gating" in name and bias != DEFAULTS["model.gate_bias"]
    return f"{name}-bias{bias:g}" if has_bias else name


def _changed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the paper's."""
    changed = {
        key: "/".join(map(str, value)) if isinstance(value, list) else value
        for key, value in config.items()
        if value != DEFAULTS.get(key)
        and key not in _NOT_RECIPE
        and not key.startswith(("eval.", "log."))
    }
    if config["optim.schedule"] != "piecewise":
        changed.pop("optim.boundaries_steps", None)
    return changed


def _warmup(config: dict[str, Any]) -> str:
    kind = "linear warm-up" if config["optim.warmup_linear"] else "warm-up"
    if config["optim.warmup_error"]:
        return f"{kind} until error {100 * config['optim.warmup_error']:g} %"
    return f"{kind} {steps:,} steps" if (steps := config["optim.warmup_steps"]) else ""


def _remarks(config: dict[str, Any], info: dict[str, Any]) -> str:
    examples = config["eval.bn_examples"]
    return commas(
        "initialised from other weights" if info.get("init_weights") else "",
        "" if config["data.split"] in ("all", "50k") else "45k training images",
        f"batch-norm statistics of {examples:,} images" if examples else "",
    )


def gather(runs: list[Run]) -> tuple[list[Experiment], list[str]]:
    """Experiments in order of their models and lengths, and notes on runs left out.

    Of two runs with the same seed only one counts: they are not independent.
    """
    kept: dict[tuple[str, int], Run] = {}
    notes = []
    for run in sorted(runs, key=lambda run: not run.result):
        first = kept.setdefault((run.key, run.config["seed"]), run)
        if first is not run:
            same = f"{first.directory} is the same run with the same seed"
            notes.append(f"{run.directory} is left out: {same}")
    by_seed = sorted(kept.values(), key=lambda run: run.config["seed"])
    experiments = map(Experiment, grouped(by_seed, lambda run: run.key).values())
    return sorted(experiments, key=_order), notes


def _order(e: Experiment):
    family = e.model.partition("_")[2], not e.model.startswith("resnet")
    return family, e.depth, e.model, not e.is_paper, -e.steps


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Lists of items with an equal key."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_classes(experiments: list[Experiment]) -> dict[tuple[str, ...], list[Experiment]]:
    """Experiments whose finished runs have confusion matrices, by the names of their classes."""

    def have_matrices(e: Experiment) -> bool:
        return bool(e.finished) and all(run.confusion is not None for run in e.finished)

    known = filter(have_matrices, experiments)
    return grouped(known, lambda e: tuple(map(str, e.finished[0].result["class_names"])))
