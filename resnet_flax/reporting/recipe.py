"""How a run was trained, in words, going by how it differs from the paper's recipe."""

import dataclasses
import json
from typing import Any

from resnet_flax.config import OPERATIONAL_KEYS, base_config, flatten

PAPER_STEPS = 64_000
_LENGTH = {"train.total_steps", "optim.boundaries_steps"}
# What is a net's and not a recipe's, is said in another place, or does not change what is learned.
_ASIDE = {
    "seed", "model.name", "model.shortcut", "model.gate_bias", "model.num_classes", "model.scan",
    "model.cpu_convolutions", "model.remat", "model.dtype", "data.name", "data.split",
    "data.workers", "data.max_unreadable", "optim.warmup_steps", "optim.warmup_error",
    "optim.warmup_rate", "optim.warmup_linear",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run was trained.

    Attributes:
      is_paper: the paper's way, but perhaps for the length.
      is_full: and for its 64k iterations.
      steps: length of the run.
      text: what sets it apart.
    """

    is_paper: bool
    is_full: bool
    steps: int
    text: str


def describe(config: dict[str, Any], steps: int) -> Recipe:
    """The recipe in a flat configuration, of JSON's types, of a run of so many steps."""
    paper = json.loads(json.dumps(flatten(base_config())))
    differing = {
        key: value
        for key, value in config.items()
        if value != paper.get(key)
        and key not in OPERATIONAL_KEYS | _ASIDE
        and not key.startswith(("eval.", "log."))
    }
    if config.get("optim.schedule") != "piecewise":
        differing.pop("optim.boundaries_steps", None)
    is_paper = not differing.keys() - _LENGTH
    is_full = not differing
    differing = {k: v for k, v in differing.items() if k != "train.total_steps"}
    if is_paper:
        parts = ["paper's"]
    else:
        short = {k.partition(".")[2]: v for k, v in differing.items()}
        parts = ["; ".join(f"{k}={_show(v)}" for k, v in sorted(short.items()))]
    parts += [text for text in (_warmup(config), _data(config), _evaluation(config)) if text]
    return Recipe(is_paper, is_full, steps, ", ".join(parts))


def _show(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _warmup(config: dict[str, Any]) -> str:
    kind = "linear warm-up" if config["optim.warmup_linear"] else "warm-up"
    if config["optim.warmup_error"]:
        return f"{kind} until error {100 * config['optim.warmup_error']:g} %"
    if config["optim.warmup_steps"]:
        return f"{kind} {config['optim.warmup_steps']:,} steps"
    return ""


def _data(config: dict[str, Any]) -> str:
    return "" if config["data.split"] in ("all", "50k") else "45k training images"


def _evaluation(config: dict[str, Any]) -> str:
    examples = config["eval.bn_examples"]
    return f"batch-norm statistics of {examples:,} images" if examples else ""
