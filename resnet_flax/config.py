"""Every setting of a run: its default, its unit, and what values make sense.

A file in `configs/` is `base_config()` with a few lines changed. Only `train` and the entry points
hold a whole configuration; everything below them takes explicit arguments.
"""

import difflib
import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from resnet_flax.errors import UserError


def base_config() -> ConfigDict:
    """The paper's CIFAR-10 recipe for ResNet-20 [R §4.2], every key with its unit.

    Durations: each key `<x>_steps` has siblings `<x>_epochs` and `<x>_examples`; one of them that
    is not 0 (or not empty) replaces the `_steps` value. One step is one batch.
    """
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order, augmentation and the validation draw

    c.model = ConfigDict()
    c.model.name = "resnet20"  # one of resnet_flax.models.ARCHITECTURES
    c.model.shortcut = "auto"  # "A", "B", "C"; "auto": the paper's for this net
    c.model.num_classes = 0  # outputs; 0: as many as the data set has classes
    c.model.dtype = "float32"  # of activations: "float32", "bfloat16"; "auto": bfloat16 off the CPU
    c.model.stride_in_3x3 = False  # bottlenecks: stride in the 3x3, not in the first 1x1
    # probability that the last block takes part in a training step (stochastic depth); 1: off
    c.model.survival = 1.0
    c.model.gate_bias = -6.0  # initial bias of the gates, where the net has any
    c.model.zero_init_last = False  # begin with each block as its shortcut (last scales at 0)
    c.model.bn_group_size = 0  # examples per batch-norm group; 0: the global batch
    c.model.bn_momentum = 0.9  # share of the running statistics kept at each step
    c.model.scan = "auto"  # equal blocks as one loop: "always", "never"; "auto": very deep nets
    c.model.remat = False  # compute activations again in the backward pass, to save memory

    c.data = ConfigDict()
    c.data.name = "cifar10"  # "cifar10", "cifar100", "digits"
    c.data.data_dir = ""  # TFDS directory; "": $TFDS_DATA_DIR, else TFDS's default
    c.data.archive = ""  # the original tar.gz, to prepare the data set from where there is none
    c.data.mirror = ""  # URL of a copy of the archive (or of its directory), used after `archive`
    c.data.split = "all"  # "all" (50k) for training, or "45k/5k": a balanced tenth for validation
    c.data.batch_size = 128  # examples per step over all devices
    c.data.pad = 4  # pixels around an image before the random crop; 0: no crop
    c.data.fill = "zero"  # what they are: "zero"; "edge": the nearest pixel of the image
    c.data.flip = True  # mirror half of the images
    # "pixel_mean": subtract it; "pixel_mean_255": divide by 255 then; "channel": subtract each
    # channel's mean, divide by its deviation
    c.data.normalize = "pixel_mean"

    c.optim = ConfigDict()
    c.optim.name = "sgd"  # "sgd", "adam"
    c.optim.learning_rate = 0.1
    c.optim.schedule = "piecewise"  # "piecewise", "cosine" (to 0 at the last step), "constant"
    c.optim.boundaries_steps = (32_000, 48_000)  # where "piecewise" multiplies the rate
    c.optim.decay_factor = 0.1  # by what it multiplies it
    c.optim.decay_factors = ()  # or one factor a boundary, of the first rate; (): decay_factor
    c.optim.warmup_steps = 0  # length of the warm-up, when it does not go by error
    c.optim.warmup_error = 0.0  # warm up until the training error (0 to 1) is below; 0: by steps
    c.optim.warmup_rate = 0.01  # learning rate during the warm-up, or at the start of a linear one
    c.optim.warmup_linear = False  # rise from warmup_rate to the schedule's rate over warmup_steps
    c.optim.momentum = 0.9  # with adam: of its first moment
    c.optim.nesterov = False
    c.optim.weight_decay = 1e-4  # added to the gradient as weight_decay * parameter
    c.optim.decay_norm_and_bias = True  # decay batch-norm scales and all biases too
    c.optim.label_smoothing = 0.0  # share of the target spread over all classes
    c.optim.ema_decay = 0.0  # of the averaged weights used for evaluation, per step; 0: none

    c.train = ConfigDict()
    c.train.total_steps = 64_000  # length of the run
    c.train.chunk_steps = 0  # steps per dispatch; 0: 100 on accelerators, 1 on a CPU
    c.train.cpu_devices = 0  # devices a CPU is split into; 0: one per core where that divides

    c.eval = ConfigDict()
    c.eval.every_steps = 500  # between evaluations; the last step is always evaluated
    c.eval.batch_size = 1000  # examples per evaluation batch over all devices
    c.eval.bn_examples = 0  # training examples to re-estimate batch-norm statistics from; 0: none

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 1000  # between checkpoints; the last step is always saved
    c.checkpoint.keep = 2  # newest checkpoints kept, beside the best one

    c.log = ConfigDict()
    c.log.every_steps = 100  # between records of the training loss
    c.log.tensorboard = True  # write TensorBoard events too

    for section in (c.optim, c.train, c.eval, c.checkpoint, c.log):
        for key in [k for k in section if k.endswith("_steps") and k != "chunk_steps"]:
            empty = () if isinstance(section[key], tuple) else 0.0
            section[key.replace("_steps", "_epochs")] = empty
            section[key.replace("_steps", "_examples")] = () if empty == () else 0
    return c


# A run may go on with other values of these: none changes a result by more than rounding.
OPERATIONAL_KEYS = frozenset(
    "data.data_dir data.archive data.mirror train.chunk_steps train.cpu_devices eval.batch_size "
    "checkpoint.keep checkpoint.every_steps checkpoint.every_epochs checkpoint.every_examples "
    "log.tensorboard".split()
)

_OWN_SHORTCUTS = (
    "bare constant_scaling conv_shortcut exclusive_gating shortcut_gating highway".split()
)
_CHOICES = {
    # After C: what nets that leave no choice are recorded with.
    "model.shortcut": ("auto", "A", "B", "C", "none", *_OWN_SHORTCUTS),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.scan": ("auto", "always", "never"),
    "data.normalize": ("pixel_mean", "pixel_mean_255", "channel"),
    "data.fill": ("zero", "edge"),
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
    "data.pad": (0, 1024, True, True),
    "optim.learning_rate": (0, 1e6, False, True),
    "optim.decay_factor": (0, math.inf, False, False),
    "optim.warmup_error": (0, 1, True, True),
    "optim.warmup_rate": (0, 1e6, True, True),
    "optim.momentum": (0, 1, True, False),
    "optim.weight_decay": (0, math.inf, True, False),
    "optim.label_smoothing": (0, 1, True, False),
    "optim.ema_decay": (0, 1, True, False),
    "train.chunk_steps": (0, math.inf, True, False),
    "train.cpu_devices": (0, math.inf, True, False),
    "eval.batch_size": (1, math.inf, True, False),
    "eval.bn_examples": (0, math.inf, True, False),
    "checkpoint.keep": (1, math.inf, True, False),
}
# Steps are counted in 32 bits on the devices.
_LONGEST = 2**31


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"model.name": "resnet20", …}` of a nested configuration."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def nearest_key(key: str) -> str | None:
    """The declared key most like `key` ("optim.lerning_rate"), or None."""
    known = list(flatten(base_config()))
    # First a right name in a wrong section, or in none.
    near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return near[0] if near else None


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
            raise UserError(f"config.{key}={value!r} must be one of {', '.join(_CHOICES[key])}")
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
        if not 0 <= v < _LONGEST or (v == 0 and not zero_ok):
            raise UserError(f"config.{key}={value} must be a positive duration, below {_LONGEST}")
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


def resolve_steps(config: ConfigDict, train_examples: int) -> ConfigDict:
    """A copy in which every duration stands in its `_steps` key and the siblings are empty.

    Args:
      config: a validated configuration.
      train_examples: size of the training set, which makes an epoch.

    Raises:
      UserError: two of a duration's three forms are given, or one is shorter than a step.
    """
    c = config.copy_and_resolve_references()
    if c.data.batch_size > train_examples:
        raise UserError(
            f"config.data.batch_size={c.data.batch_size} exceeds the {train_examples} training "
            f"examples of {c.data.name}"
        )
    for section_name, section in c.items():
        if not isinstance(section, ConfigDict):
            continue
        for key in [k for k in section if k.endswith("_epochs")]:
            stem = key.removesuffix("_epochs")
            epochs, examples = section[key], section[f"{stem}_examples"]
            if epochs and examples:
                raise UserError(
                    f"give one of config.{section_name}.{stem}_epochs={epochs} and "
                    f"config.{section_name}.{stem}_examples={examples}, not both"
                )
            if not epochs and not examples:
                continue
            given, unit = (epochs, train_examples) if epochs else (examples, 1)
            many = given if isinstance(given, tuple) else (given,)
            steps = tuple(round(v * unit / c.data.batch_size) for v in many)
            if min(steps) < 1:
                raise UserError(f"config.{section_name}.{stem}: {given} is shorter than one step")
            if len(set(steps)) < len(steps) or max(steps) >= _LONGEST:
                raise UserError(f"config.{section_name}.{stem}: {given} makes the steps {steps}")
            section[f"{stem}_steps"] = steps if isinstance(given, tuple) else steps[0]
            section[key], section[f"{stem}_examples"] = type(epochs)(), type(examples)()
    return c
