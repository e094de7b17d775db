"""Shortening a run for a trial."""

from collections.abc import Container
from typing import Any

from ml_collections import ConfigDict

from resnet_flax.config import flatten
from resnet_flax.errors import UserError

# A trial evaluates and saves no more often than this many steps, or four times in all: as often as
# the run it stands for, it would do little else.
_SHORTEST_PERIOD, _PERIODS = 50, 4


def scaled(config: ConfigDict, scale: float, given: Container[str] = ()) -> dict[str, Any]:
    """What to override so that every duration of a run is multiplied by `scale`.

    Lengths and boundaries are rounded to whole steps, at least one; boundaries still rise. Periods
    are shortened likewise, but evaluations and checkpoints do not come closer than 50 steps or a
    quarter of the run, and none is longer than the run.

    Args:
      config: of the run.
      scale: above 0; 1 changes nothing.
      given: keys that the user has set, which stay as they are.

    Returns:
      Values by flat key.

    Raises:
      UserError: the scale makes no sense, or a duration is not given in steps.
    """
    if not 0 < scale <= 1:
        raise UserError(f"--scale={scale:g} must be above 0 and at most 1")
    if scale == 1:
        return {}
    for key, value in flatten(config).items():
        if key.endswith(("_epochs", "_examples")) and key != "eval.bn_examples" and value:
            stem = key.rpartition("_")[0]
            raise UserError(
                f"--scale shortens durations in steps, but config.{key}={value} is none: give "
                f"config.{stem}_steps"
            )

    def shorten(steps: int) -> int:
        return max(1, round(steps * scale))

    total = config.train.total_steps
    total = total if "train.total_steps" in given else shorten(total)
    rarest = max(1, min(_SHORTEST_PERIOD, total // _PERIODS))

    def period(steps: int, least: int = 1) -> int:
        # A period that is short already stays what it is.
        return min(total, max(shorten(steps), min(least, steps)))

    boundaries: list[int] = []
    for boundary in config.optim.boundaries_steps:
        boundaries.append(max(shorten(boundary), boundaries[-1] + 1 if boundaries else 1))
    overrides = {
        "train.total_steps": total,
        "optim.boundaries_steps": tuple(boundaries),
        "eval.every_steps": period(config.eval.every_steps, rarest),
        "checkpoint.every_steps": period(config.checkpoint.every_steps, rarest),
        "log.every_steps": period(config.log.every_steps),
    }
    if config.optim.warmup_steps:
        overrides["optim.warmup_steps"] = shorten(config.optim.warmup_steps)
    return {key: value for key, value in overrides.items() if key not in given}
