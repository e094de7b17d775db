"""What a finished run leaves: its weights, its curves and, last, its result.

All errors in these files are fractions, 0 to 1.
"""

import dataclasses
import pathlib
from typing import Any

from resnet_flax.runs import files
from resnet_flax.runs.metrics import of_split, recent_error
from resnet_flax.runs.pictures import draw_curves
from resnet_flax.runs.weights import Weights, save


def best(records: list[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """The first record of the lowest error in a split, None if there is none."""
    return min(of_split(records, split), key=lambda r: r["error"], default=None)


def write(
    directory: pathlib.Path,
    weights: Weights,
    test: dict[str, Any],
    records: list[dict[str, Any]],
    *,
    confusion: list[list[int]],
    facts: dict[str, Any],
    epoch: int,
    costs: dict[str, Any],
) -> dict[str, Any]:
    """Writes `weights.safetensors`, `curves.png` and, last, `result.json`; returns its content.

    The headline is the test error of the last step. Beside it stands the test error at the step of
    the lowest validation error, null without a validation split. The lowest test error of all is
    there because others quote it, and is named for what it is.

    Args:
      directory: of the run.
      weights: to save; the result is added to their `training`.
      test: record of the last step's score on the test split.
      records: all records of the run.
      confusion: of the test split, examples by (label, prediction).
      facts: what the run is: "data", "seed", "steps" and the like.
      epoch: number of training examples in an epoch.
      costs: time, speed, environment.
    """
    at_validation = best(records, "validation")
    test_errors = {r["step"]: r["error"] for r in of_split(records, "test")}
    details = {
        "test_top5_error_last": test.get("top5_error"),
        "test_unreadable_last": test.get("unreadable"),
        "test_class_errors_last": test.get("class_errors"),
        "test_confusion_last": confusion if "class_errors" in test else None,
    }
    model = weights.model
    result = {
        "model": model["name"],
        "shortcut": model["shortcut"],
        **facts,
        "test_error_last": test["error"],
        "test_loss_last": test["loss"],
        "test_wrong_last": test["wrong"],
        "test_examples": test["examples"],
        "test_error_at_best_validation": at_validation and test_errors.get(at_validation["step"]),
        "best_validation_step": at_validation and at_validation["step"],
        "test_error_best_is_leakage": min(test_errors.values(), default=None),
        "train_error_last": recent_error(records, epoch),
        "class_names": weights.class_names,
        **{key: value for key, value in details.items() if value is not None},
        **costs,
    }
    training = {k: v for k, v in result.items() if k not in ("class_names", "test_confusion_last")}
    weights = dataclasses.replace(weights, training=training | weights.training)
    save(directory / "weights.safetensors", weights)
    title = f"{model['name']} on {facts['data']}"
    draw_curves(records, directory / "curves.png", title)
    files.write_json(directory / "result.json", result)
    return result
