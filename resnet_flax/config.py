"""Every setting of a run: its default, its unit, and the values that make sense.

A file in `configs/` is `base_config()` with a few lines changed.
"""

import ast
import difflib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from resnet_flax.errors import UserError

# Durations and seeds have 32 bits on the devices.
LONGEST = 2**31

_AUTO = "auto", "always", "never"

# Each key's default, and its allowed values: an interval, a tuple of choices, or "" where its type
# or another part of the program decides. One step is one batch. Each duration `<x>_steps` has
# siblings `<x>_epochs` and `<x>_examples`; one that is not 0 (or not empty) replaces the steps.
_KEYS: dict[str, tuple[Any, str | tuple]] = {
    "seed": (0, "[0, 2147483648)"),  # of the first weights, data order, augmentation, validation
    "model.name": ("resnet20", ""),  # one of models.ARCHITECTURES; "auto": the net of --weights
    "model.shortcut": ("auto", ""),  # "A", "B", "C"; "auto": the paper's for this net
    "model.num_classes": (0, "[0, 2147483648)"),  # outputs; 0: as many as the data have classes
    # of activations; "auto": bfloat16 on a GPU or TPU, float32 on a CPU. A GPU multiplies float32
    # as TF32, with 10 bits after the point, as in PyTorch's convolutions; a TPU as bfloat16
    "model.dtype": ("auto", ("auto", "float32", "bfloat16")),
    "model.stride_in_3x3": (False, ""),  # bottlenecks: stride in the 3x3, not in the first 1x1
    "model.survival": (1.0, "(0, 1]"),  # of the last block in a step (stochastic depth); 1: off
    "model.gate_bias": (-6.0, "[-100, 100]"),  # initial bias of the gates, where a net has any
    "model.zero_init_last": (False, ""),  # each block begins as its shortcut (last scales at 0)
    "model.bn_group_size": (0, "[0, inf)"),  # examples per batch-norm group; 0: the global batch
    "model.bn_momentum": (0.9, "[0, 1]"),  # share of the running statistics kept at each step
    "model.cpu_convolutions": ("auto", _AUTO),  # models/cpu_convolution.py; "auto": on a CPU
    # narrow convolutions on one GPU by models/fused/; "auto": where faster, so far nowhere
    "model.kernels": ("auto", _AUTO),
    "model.scan": ("auto", _AUTO),  # equal blocks as one loop; "auto": very deep nets
    "model.remat": (False, ""),  # compute activations again in the backward pass, to save memory
    "data.name": ("cifar10", ""),  # "cifar10", "cifar100", "digits", "folder", "imagenet2012"
    # TFDS directory; "": $TFDS_DATA_DIR, else TFDS's default. For "folder": the folder of images
    "data.data_dir": ("", ""),
    "data.archive": ("", ""),  # the tar.gz to prepare it from; imagenet2012: the folder of two tars
    "data.mirror": ("", ""),  # URL of a copy of the archive (or of its directory), after `archive`
    "data.split": ("all", ""),  # "all" (50k) for training; "45k/5k": a balanced tenth to validate
    "data.batch_size": (128, "[1, inf)"),  # examples per step over all devices
    # pixels around an image before the random crop; 0: no crop; -1: 4 for nets of CIFAR, else 0
    "data.pad": (4, "[-1, 1024]"),
    "data.fill": ("zero", ("zero", "edge")),  # what they are; "edge": the image's nearest pixel
    "data.flip": (True, ""),  # mirror half of the images
    # "pixel_mean": subtract it; "pixel_mean_255": divide by 255 then; "channel": subtract each
    # channel's mean, divide by its deviation; "imagenet": the same with ImageNet's usual numbers
    "data.normalize": ("pixel_mean", ("pixel_mean", "pixel_mean_255", "channel", "imagenet")),
    # Of images that are streamed ("folder", "imagenet2012"), sides in pixels:
    "data.image_size": (0, "[0, 4096]"),  # side of an example; 0: what the net is made for
    # range of the shorter side before a square is cut out; (): in proportion to 256 to 480 for 224
    "data.short_sides": ((), ""),  # [R §3.4]; for nets of CIFAR the image size itself
    "data.eval_short_side": (0, "[0, 4096]"),  # in evaluation; 0: 256 for 224, or the image size
    "data.color": (False, ""),  # shift each training image's colours [R §3.4]
    "data.workers": (-1, "[-1, 1024]"),  # that decode; 0: threads; -1: one per core, at most 16
    "data.max_unreadable": (100, "[0, inf)"),  # images of a split to pass over; more end the run
    "optim.name": ("sgd", ("sgd", "adam")),
    "optim.learning_rate": (0.1, "(0, 1000000]"),
    "optim.schedule": ("piecewise", ("piecewise", "cosine", "constant")),  # "cosine" ends at 0
    "optim.boundaries_steps": ((32_000, 48_000), ""),  # where "piecewise" multiplies the rate
    "optim.decay_factor": (0.1, "(0, inf)"),  # by what it multiplies it
    "optim.decay_factors": ((), ""),  # or a factor of the first rate a boundary; (): decay_factor
    "optim.warmup_steps": (0, ""),  # length of the warm-up, when it does not go by error
    "optim.warmup_error": (0.0, "[0, 1]"),  # it lasts until the training error is below; 0: steps
    "optim.warmup_rate": (0.01, "[0, 1000000]"),  # during the warm-up, or where a linear one starts
    "optim.warmup_linear": (False, ""),  # rise from warmup_rate to the rate over warmup_steps
    "optim.momentum": (0.9, "[0, 1)"),  # with adam: of its first moment
    "optim.nesterov": (False, ""),
    "optim.weight_decay": (1e-4, "[0, inf)"),  # times the parameter, added to the gradient
    "optim.decay_norm_and_bias": (True, ""),  # decay batch-norm scales and all biases too
    "optim.label_smoothing": (0.0, "[0, 1)"),  # share of the target spread over all classes
    "optim.ema_decay": (0.0, "[0, 1)"),  # of averaged weights to evaluate, per step; 0: none
    "train.total_steps": (64_000, ""),  # length of the run
    "train.num_seeds": (1, "[1, 64]"),  # runs trained at once, with the seeds from `seed` on
    "train.chunk_steps": (0, ""),  # per dispatch; 0: 100 on accelerators, 1 on a CPU
    "train.cpu_devices": (0, "[0, inf)"),  # in each process; 0: one per core where that divides
    "eval.every_steps": (500, ""),  # between evaluations; the last step is always evaluated
    "eval.batch_size": (1000, "[1, inf)"),  # examples per evaluation batch over all devices
    "eval.crops": (1, (1, 10)),  # of a streamed image that are scored; 1: the centre [R §3.4]
    "eval.bn_examples": (0, "[0, inf)"),  # that re-estimate batch-norm statistics; 0: none
    "checkpoint.every_steps": (1000, ""),  # between checkpoints; the last step is always saved
    "checkpoint.keep": (2, "[1, inf)"),  # newest checkpoints kept, beside the best one
    "log.every_steps": (100, ""),  # between records of the training loss
    "log.tensorboard": (True, ""),  # write TensorBoard events too
}

# A run may resume with other values of these: none changes a result by more than rounding.
OPERATIONAL_KEYS = frozenset(
    "data.data_dir data.archive data.mirror train.chunk_steps train.cpu_devices eval.batch_size "
    "model.cpu_convolutions model.kernels data.workers checkpoint.keep checkpoint.every_steps "
    "checkpoint.every_epochs checkpoint.every_examples log.tensorboard".split()
)


def base_config() -> ConfigDict:
    """Every key at its default: the paper's CIFAR-10 recipe for ResNet-20 [R §4.2]."""
    tree: dict[str, Any] = {}
    for key, (default, _) in _KEYS.items():
        section, _, name = key.rpartition(".")
        target = tree.setdefault(section, {}) if section else tree
        target[name] = default
        if name.endswith("_steps") and name != "chunk_steps":
            stem, many = name.removesuffix("steps"), isinstance(default, tuple)
            target[f"{stem}epochs"], target[f"{stem}examples"] = ((), ()) if many else (0.0, 0)
    return ConfigDict(tree)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"model.name": "resnet20", …}` of a nested configuration."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten(base_config())


def check_key(key: str) -> None:
    """Raises a UserError, with the nearest key, for what is not a key."""
    known = _defaults()
    if key in known:
        return
    # First a right name in a wrong section, or in none.
    near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean --config.{near[0]}?)" if near else ""
    is_section = any(k.startswith(f"{key}.") for k in known)
    what = "a section of the config, not a key" if is_section else "no config key"
    raise UserError(f"--config.{key} is {what}{hint}")


def _parse_whole(text: str) -> int:
    if (value := int(number := float(text))) != number:
        raise ValueError
    return value


def _parse_numbers(text: str) -> tuple:
    value = ast.literal_eval(text)
    value = value if isinstance(value, tuple) else (value,)
    sum(value)  # A TypeError for anything but numbers.
    return value


# By the type of a key's default: what its text must be, and how it is read.
_PARSERS: dict[type, tuple[str, Callable[[str], Any]]] = {
    str: ("text", str),
    bool: ("true or false", flags.BooleanParser().parse),
    int: ("a whole number", _parse_whole),
    float: ("a number", float),
    tuple: ("numbers with commas between them", _parse_numbers),
}


def parse(key: str, text: str) -> Any:
    """The value of `key` ("data.batch_size") given as text; 1e3 is a whole number.

    Raises:
      UserError: there is no such key, or the value is not of its type.
    """
    check_key(key)
    kind, read = _PARSERS[type(_defaults()[key])]
    try:
        return read(text)
    except (ValueError, TypeError, SyntaxError, OverflowError) as error:
        raise UserError(f"--config.{key}={text} must be {kind}") from error


def override(config: ConfigDict, changes: Mapping[str, str]) -> None:
    """Sets keys, in place, to values given as text."""
    config.update_from_flattened_dict({key: parse(key, text) for key, text in changes.items()})


def validate(config: ConfigDict) -> None:
    """Raises a UserError for every mistake that shows before data or devices are touched."""
    flat, defaults = flatten(config), _defaults()
    for key, value in flat.items():
        check_key(key)
        _check_type(key, value, defaults[key])
        _check_value(key, value, defaults[key])
    for key in sorted(defaults.keys() - flat.keys()):
        raise UserError(f"config lacks {key!r}: start from resnet_flax.config.base_config()")
    for message in _contradictions(config):
        raise UserError(message)


def _check_type(key: str, value: Any, default: Any) -> None:
    want, kind = type(default), type(default).__name__
    right = type(value) is want or (want is float and type(value) is int)
    if want is tuple:
        kind = "tuple of numbers"
        right = right and all(type(v) in (int, float) for v in value)
    if not right:
        raise UserError(f"config.{key}={value!r} is of type {type(value).__name__}, must be {kind}")
    if want is float and not math.isfinite(value):
        raise UserError(f"config.{key}={value} must be finite")


def _check_value(key: str, value: Any, default: Any) -> None:
    if key.endswith(("_steps", "_epochs", "_examples")):
        many = value if isinstance(value, tuple) else (value,)
        if any(not 0 <= v < LONGEST or (v == 0 and default != 0) for v in many):
            raise UserError(f"config.{key}={value} must be a positive duration, below {LONGEST}")
        if any(a >= b for a, b in itertools.pairwise(many)):
            raise UserError(f"config.{key}={value} must be in rising order")
    allowed = _KEYS[key][1] if key in _KEYS else ""
    if isinstance(allowed, tuple) and value not in allowed:
        raise UserError(f"config.{key}={value!r} must be one of {', '.join(map(str, allowed))}")
    if allowed and isinstance(allowed, str):
        low, high = map(float, allowed[1:-1].split(","))
        at_end = (value == low and allowed[0] == "[") or (value == high and allowed[-1] == "]")
        if not (low < value < high or at_end):
            raise UserError(f"config.{key}={value} must lie in {allowed}")


def _contradictions(config: ConfigDict) -> Iterator[str]:
    """Complaints about values that are right one by one, but not together."""
    o, sides, group = config.optim, config.data.short_sides, config.model.bn_group_size
    lasts = o.warmup_steps or o.warmup_epochs or o.warmup_examples
    if o.warmup_error and lasts:
        yield (
            f"config.optim.warmup_error={o.warmup_error} and a length of the warm-up exclude each "
            "other: set one of them to 0"
        )
    if o.warmup_error and not o.warmup_rate:
        yield "config.optim.warmup_rate=0 with warmup_error would never end: raise it"
    if o.warmup_linear and not lasts:
        yield "config.optim.warmup_linear needs config.optim.warmup_steps"
    factors = f"config.optim.decay_factors={o.decay_factors}"
    boundaries = o.boundaries_epochs or o.boundaries_examples or o.boundaries_steps
    if o.decay_factors and len(o.decay_factors) != len(boundaries):
        yield f"{factors} must be as many as the boundaries {boundaries}"
    if any(not 0 < factor < math.inf for factor in o.decay_factors):
        yield f"{factors} must be above 0 and finite"
    if o.name == "adam" and o.nesterov:
        yield "config.optim.nesterov goes with config.optim.name=sgd only"
    if (last := config.seed + config.train.num_seeds - 1) >= LONGEST:
        yield f"config.train.num_seeds={config.train.num_seeds} makes the seed {last}"
    if sides and (len(sides) != 2 or not 1 <= sides[0] <= sides[1] <= 4096):
        yield f"config.data.short_sides={sides} must be two numbers of pixels, the lower one first"
    if group and config.data.batch_size % group:
        batch = f"config.data.batch_size={config.data.batch_size}"
        yield f"config.model.bn_group_size={group} does not divide {batch}"


def resolve_steps(config: ConfigDict, train_examples: int) -> ConfigDict:
    """A copy with every duration in its `_steps` key; `train_examples` make an epoch.

    Raises:
      UserError: a duration is given in epochs and in examples, or is shorter than a step.
    """
    c = config.copy_and_resolve_references()
    flat = flatten(c)
    for key in [k.removesuffix("_epochs") for k in flat if k.endswith("_epochs")]:
        epochs, examples = flat[f"{key}_epochs"], flat[f"{key}_examples"]
        if epochs and examples:
            both = f"config.{key}_epochs={epochs} or config.{key}_examples={examples}"
            raise UserError(f"give {both}, not both")
        if not epochs and not examples:
            continue
        given, unit = (epochs, train_examples) if epochs else (examples, 1)
        many = given if isinstance(given, tuple) else (given,)
        steps = tuple(round(v * unit / c.data.batch_size) for v in many)
        if min(steps) < 1:
            raise UserError(f"config.{key}: {given} is shorter than one step")
        if len(set(steps)) < len(steps) or max(steps) >= LONGEST:
            raise UserError(f"config.{key}: {given} makes the steps {steps}")
        flat[f"{key}_steps"] = steps if isinstance(given, tuple) else steps[0]
        flat[f"{key}_epochs"], flat[f"{key}_examples"] = type(epochs)(), type(examples)()
    c.update_from_flattened_dict(flat)
    return c
