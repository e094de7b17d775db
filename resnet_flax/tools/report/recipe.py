"""A run's training recipe in words: what sets it apart from the paper's."""

import json
from typing import Any, NamedTuple

from resnet_flax.config import OPERATIONAL_KEYS, base_config, flatten

# The paper's recipe, with JSON's types.
DEFAULTS: dict[str, Any] = json.loads(json.dumps(flatten(base_config())))
# Part of the model, shown elsewhere in the report, or without effect on what is learned.
_NOT_RECIPE = OPERATIONAL_KEYS | {
    "seed", "model.name", "model.shortcut", "model.gate_bias", "model.num_classes", "model.scan",
    "model.remat", "model.dtype", "data.name", "data.split", "data.max_unreadable",
    "optim.warmup_steps", "optim.warmup_error", "optim.warmup_rate", "optim.warmup_linear",
}  # fmt: skip


class Recipe(NamedTuple):
    """How a run was trained; texts that are not needed are empty."""

    is_paper: bool  # as in the paper, except perhaps for the number of steps
    is_full: bool  # as in the paper, for all its 64,000 steps
    settings: str  # "paper's", or what differs: "batch_size=64; nesterov=True"
    remarks: str  # what a reader of an error must know besides
    text: str  # settings, warm-up and remarks


def describe(config: dict[str, Any], init_weights: str | None) -> Recipe:
    """The recipe of a flat configuration that has all keys."""
    changed = {
        key: "/".join(map(str, value)) if isinstance(value, list) else value
        for key, value in config.items()
        if value != DEFAULTS.get(key)
        and key not in _NOT_RECIPE
        and not key.startswith(("eval.", "log."))
    }
    if config["optim.schedule"] != "piecewise":
        changed.pop("optim.boundaries_steps", None)
    is_full = not changed
    changed.pop("train.total_steps", None)
    is_paper = changed.keys() <= {"optim.boundaries_steps"}
    settings = sorted(f"{key.partition('.')[2]}={value}" for key, value in changed.items())
    text = "paper's" if is_paper else "; ".join(settings)

    warmup = "linear warm-up" if config["optim.warmup_linear"] else "warm-up"
    if config["optim.warmup_error"]:
        warmup += f" until error {100 * config['optim.warmup_error']:g} %"
    elif config["optim.warmup_steps"]:
        warmup += f" {config['optim.warmup_steps']:,} steps"
    else:
        warmup = ""

    remarks = ["initialised from other weights"] if init_weights else []
    if config["data.split"] not in ("all", "50k"):
        remarks.append("45k training images")
    if examples := config["eval.bn_examples"]:
        remarks.append(f"batch-norm statistics of {examples:,} images")
    everything = ", ".join(filter(None, (text, warmup, *remarks)))
    return Recipe(is_paper, is_full, text, ", ".join(remarks), everything)
