"""What values of a configuration make sense."""

import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from resnet_flax.config import LONGEST, base_config, flatten, nearest_key
from resnet_flax.errors import UserError

_OWN_SHORTCUTS = (
    "bare constant_scaling conv_shortcut exclusive_gating shortcut_gating highway".split()
)
_CHOICES = {
    # After C: what nets that leave no choice are recorded with.
    "model.shortcut": ("auto", "A", "B", "C", "none", *_OWN_SHORTCUTS),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.cpu_convolutions": ("auto", "always", "never"),
    "model.kernels": ("auto", "always", "never"),
    "model.scan": ("auto", "always", "never"),
    "data.normalize": ("pixel_mean", "pixel_mean_255", "channel", "imagenet"),
    "data.fill": ("zero", "edge"),
    "eval.crops": (1, 10),
    "optim.name": ("sgd", "adam"),
    "optim.schedule": ("piecewise", "cosine", "constant"),
}
# key: (lowest, highest, whether the lowest itself is allowed, whether the highest is)
_RANGES = {
    "seed": (0, 2**31, True, False),
    "model.num_classes": (0, 2**31, True, False),
    "model.survival": (0, 1, False, True),
    "model.gate_bias": (-100, 100, True, True),
    "model.bn_group_size": (0, math.inf, True, False),
    "model.bn_momentum": (0, 1, True, True),
    "data.batch_size": (1, math.inf, True, False),
    "data.pad": (-1, 1024, True, True),
    "data.image_size": (0, 4096, True, True),
    "data.eval_short_side": (0, 4096, True, True),
    "data.workers": (-1, 1024, True, True),
    "data.max_unreadable": (0, math.inf, True, False),
    "optim.learning_rate": (0, 1e6, False, True),
    "optim.decay_factor": (0, math.inf, False, False),
    "optim.warmup_error": (0, 1, True, True),
    "optim.warmup_rate": (0, 1e6, True, True),
    "optim.momentum": (0, 1, True, False),
    "optim.weight_decay": (0, math.inf, True, False),
    "optim.label_smoothing": (0, 1, True, False),
    "optim.ema_decay": (0, 1, True, False),
    "train.num_seeds": (1, 64, True, True),
    "train.chunk_steps": (0, math.inf, True, False),
    "train.cpu_devices": (0, math.inf, True, False),
    "eval.batch_size": (1, math.inf, True, False),
    "eval.bn_examples": (0, math.inf, True, False),
    "checkpoint.keep": (1, math.inf, True, False),
}


def validate(config: ConfigDict) -> None:
    """Checks everything that can be checked before data or devices are touched.

    Raises:
      UserError: names the key, its value, and what would be right.
    """
    declared = flatten(base_config())
    flat = flatten(config)
    for key, value in flat.items():
        if key not in declared:
            near = nearest_key(key)
            hint = f" (did you mean {near!r}?)" if near else ""
            raise UserError(f"unknown config key {key!r}{hint}")
        _check_type(key, value, declared[key])
        if key in _CHOICES and value not in _CHOICES[key]:
            known = ", ".join(map(str, _CHOICES[key]))
            raise UserError(f"config.{key}={value!r} must be one of {known}")
        if key in _RANGES:
            low, high, with_low, with_high = _RANGES[key]
            if not (
                low < value < high or (value == low and with_low) or (value == high and with_high)
            ):
                bounds = f"{'[' if with_low else '('}{low}, {high}{']' if with_high else ')'}"
                raise UserError(f"config.{key}={value} must lie in {bounds}")
        if key.endswith(("_steps", "_epochs", "_examples")):
            _check_duration(key, value)
    missing = [key for key in declared if key not in flat]
    if missing:
        raise UserError(f"config lacks {missing[0]!r}: start from resnet_flax.config.base_config()")
    _check_warmup(config.optim)
    _check_decay(config.optim)
    last = config.seed + config.train.num_seeds - 1
    if last >= 2**31:
        raise UserError(f"config.train.num_seeds={config.train.num_seeds} makes the seed {last}")
    sides = config.data.short_sides
    if sides and (len(sides) != 2 or not 1 <= sides[0] <= sides[1] <= 4096):
        raise UserError(
            f"config.data.short_sides={sides} must be two numbers of pixels, the lower one first"
        )
    group = config.model.bn_group_size
    if group and config.data.batch_size % group:
        raise UserError(
            f"config.model.bn_group_size={group} does not divide "
            f"config.data.batch_size={config.data.batch_size}"
        )


def _check_duration(key: str, value: Any) -> None:
    many = value if isinstance(value, tuple) else (value,)
    zero_ok = (
        key in ("optim.warmup_steps", "train.chunk_steps") or not key.endswith("_steps")
    ) and not isinstance(value, tuple)
    for v in many:
        if not 0 <= v < LONGEST or (v == 0 and not zero_ok):
            raise UserError(f"config.{key}={value} must be a positive duration, below {LONGEST}")
    if any(a >= b for a, b in itertools.pairwise(many)):
        raise UserError(f"config.{key}={value} must be in rising order")


def _check_warmup(o: ConfigDict) -> None:
    lasts = o.warmup_steps or o.warmup_epochs or o.warmup_examples
    if o.warmup_error and lasts:
        raise UserError(
            f"config.optim.warmup_error={o.warmup_error} and a length of the warm-up exclude each "
            "other: set one of them to 0"
        )
    if o.warmup_error and not o.warmup_rate:
        raise UserError("config.optim.warmup_rate=0 with warmup_error would never end: raise it")
    if o.warmup_linear and not lasts:
        raise UserError("config.optim.warmup_linear needs config.optim.warmup_steps")


def _check_decay(o: ConfigDict) -> None:
    boundaries = o.boundaries_epochs or o.boundaries_examples or o.boundaries_steps
    if o.decay_factors and len(o.decay_factors) != len(boundaries):
        raise UserError(
            f"config.optim.decay_factors={o.decay_factors} must be as many as the boundaries "
            f"{boundaries}"
        )
    if any(not 0 < factor < math.inf for factor in o.decay_factors):
        raise UserError(f"config.optim.decay_factors={o.decay_factors} must be above 0 and finite")
    if o.name == "adam" and o.nesterov:
        raise UserError("config.optim.nesterov goes with config.optim.name=sgd only")


def _check_type(key: str, value: Any, default: Any) -> None:
    want = type(default)
    if want is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif want is tuple:
        right = isinstance(value, tuple) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in value
        )
    else:
        right = type(value) is want
    if not right:
        kind = "tuple of numbers" if want is tuple else want.__name__
        raise UserError(f"config.{key}={value!r} is of type {type(value).__name__}, must be {kind}")
    if want is float and not math.isfinite(value):
        raise UserError(f"config.{key}={value} must be finite")
