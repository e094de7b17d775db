"""Every setting of a run: its default, its unit, and what values make sense.

A file in `configs/` is `base_config()` with a few lines changed. Only `train` and the entry points
hold a whole configuration; everything below them takes explicit arguments.
"""

import ast
import difflib
from collections.abc import Mapping
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
    c.model.name = "resnet20"  # one of resnet_flax.models.ARCHITECTURES; "auto": that of --weights
    c.model.shortcut = "auto"  # "A", "B", "C"; "auto": the paper's for this net
    c.model.num_classes = 0  # outputs; 0: as many as the data set has classes
    # of activations: "float32", "bfloat16"; "auto": bfloat16 on a GPU or TPU, float32 on a CPU.
    # A GPU multiplies float32 as TF32, with 10 bits after the point, as in PyTorch's convolutions;
    # a TPU as bfloat16
    c.model.dtype = "auto"
    c.model.stride_in_3x3 = False  # bottlenecks: stride in the 3x3, not in the first 1x1
    # probability that the last block takes part in a training step (stochastic depth); 1: off
    c.model.survival = 1.0
    c.model.gate_bias = -6.0  # initial bias of the gates, where the net has any
    c.model.zero_init_last = False  # begin with each block as its shortcut (last scales at 0)
    c.model.bn_group_size = 0  # examples per batch-norm group; 0: the global batch
    c.model.bn_momentum = 0.9  # share of the running statistics kept at each step
    # computed as is fast on a CPU, see models/cpu_convolution.py: "always", "never"; "auto": there
    c.model.cpu_convolutions = "auto"
    # convolutions of 16 to 64 channels on one GPU in bfloat16 by models/kernels/: "always",
    # "never"; "auto": where a measurement says that it is faster, so far nowhere
    c.model.kernels = "auto"
    c.model.scan = "auto"  # equal blocks as one loop: "always", "never"; "auto": very deep nets
    c.model.remat = False  # compute activations again in the backward pass, to save memory

    c.data = ConfigDict()
    c.data.name = "cifar10"  # "cifar10", "cifar100", "digits", "folder", "imagenet2012"
    # TFDS directory; "": $TFDS_DATA_DIR, else TFDS's default. For "folder": the folder of images
    c.data.data_dir = ""
    # the original tar.gz (imagenet2012: the folder of the two tars), to prepare the data set from
    c.data.archive = ""
    c.data.mirror = ""  # URL of a copy of the archive (or of its directory), used after `archive`
    c.data.split = "all"  # "all" (50k) for training, or "45k/5k": a balanced tenth for validation
    c.data.batch_size = 128  # examples per step over all devices
    # pixels around an image before the random crop; 0: no crop; -1: 4 for nets of CIFAR, else 0
    c.data.pad = 4
    c.data.fill = "zero"  # what they are: "zero"; "edge": the nearest pixel of the image
    c.data.flip = True  # mirror half of the images
    # "pixel_mean": subtract it; "pixel_mean_255": divide by 255 then; "channel": subtract each
    # channel's mean, divide by its deviation; "imagenet": the same with ImageNet's usual numbers
    c.data.normalize = "pixel_mean"
    # Of images that are streamed ("folder", "imagenet2012"), sides in pixels:
    c.data.image_size = 0  # side of an example; 0: what the net is made for
    # range of the shorter side before a square is cut out; (): in proportion to 256 to 480 for 224
    # pixels [R §3.4]; for nets of CIFAR the image size itself
    c.data.short_sides = ()
    c.data.eval_short_side = 0  # shorter side in evaluation; 0: 256 for 224, or the image size
    c.data.color = False  # shift each training image's colours [R §3.4]
    c.data.workers = -1  # processes that decode images; 0: threads; -1: one per core, 16 at most
    c.data.max_unreadable = 100  # images of a split that may be passed over; more end the run

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
    # nets that are trained at once, with the seeds from `seed` on, each as a run of its own
    c.train.num_seeds = 1
    c.train.chunk_steps = 0  # steps per dispatch; 0: 100 on accelerators, 1 on a CPU
    # devices that each process splits its CPU into; 0: one per core where that divides
    c.train.cpu_devices = 0

    c.eval = ConfigDict()
    c.eval.every_steps = 500  # between evaluations; the last step is always evaluated
    c.eval.batch_size = 1000  # examples per evaluation batch over all devices
    c.eval.crops = 1  # parts of a streamed image that are scored: 1: the centre; 10 [R §3.4]
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


def imagenet_config() -> ConfigDict:
    """The paper's ImageNet recipe [R §3.4] for ResNet-50.

    The paper divides the rate by 10 "when the error plateaus", and does not say at which steps:
    here, as in most programs since, after every 30 epochs.
    """
    c = base_config()
    c.model.name = "resnet50"
    c.data.name = "imagenet2012"
    c.data.batch_size = 256
    c.data.pad = 0
    c.data.color = True
    c.optim.boundaries_steps = (150_000, 300_000, 450_000)
    c.train.total_steps = 600_000
    c.eval.every_steps = 5_000
    c.eval.batch_size = 256
    c.checkpoint.every_steps = 5_000
    return c


# Steps are counted in 32 bits on the devices.
LONGEST = 2**31

# A run may go on with other values of these: none changes a result by more than rounding.
OPERATIONAL_KEYS = frozenset(
    "data.data_dir data.archive data.mirror train.chunk_steps train.cpu_devices eval.batch_size "
    "model.cpu_convolutions model.kernels data.workers checkpoint.keep checkpoint.every_steps "
    "checkpoint.every_epochs checkpoint.every_examples log.tensorboard".split()
)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"model.name": "resnet20", …}` of a nested configuration."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "numbers with commas between them",
}


def parse(key: str, text: str) -> Any:
    """The value of a key ("data.batch_size") given as text; 1e3 is a whole number, too.

    Raises:
      UserError: there is no such key, or the value is not of its type.
    """
    check_key(key)
    kind = type(flatten(base_config())[key])
    if kind is str:
        return text
    try:
        if kind is bool:
            return _TRUTH[text.lower()]
        if kind is tuple:
            value = ast.literal_eval(text)
            value = value if isinstance(value, tuple) else (value,)
            sum(value)  # Fails where they are no numbers.
            return value
        if (value := kind(number := float(text))) == number:
            return value
    except (ValueError, TypeError, SyntaxError, KeyError, OverflowError):
        pass
    raise UserError(f"--config.{key}={text} must be {_KINDS[kind]}")


def override(config: ConfigDict, changes: Mapping[str, str]) -> None:
    """Sets keys to values given as text, in place, see `parse`."""
    for key, text in changes.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = parse(key, text)


def nearest_key(key: str) -> str | None:
    """The declared key most like `key` ("optim.lerning_rate"), or None."""
    known = list(flatten(base_config()))
    # First a right name in a wrong section, or in none.
    near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return near[0] if near else None


def check_key(key: str) -> None:
    """Refuses what is no key.

    Raises:
      UserError: names the nearest one.
    """
    known = flatten(base_config())
    if key not in known:
        near = nearest_key(key)
        hint = f" (did you mean --config.{near}?)" if near else ""
        sections = {known_key.split(".")[0] for known_key in known}
        what = "a section of the config, not a key" if key in sections else "no config key"
        raise UserError(f"--config.{key} is {what}{hint}")


def resolve_steps(config: ConfigDict, train_examples: int) -> ConfigDict:
    """A copy in which every duration stands in its `_steps` key and the siblings are empty.

    Args:
      config: a validated configuration.
      train_examples: size of the training set, which makes an epoch.

    Raises:
      UserError: two of a duration's three forms are given, or one is shorter than a step.
    """
    c = config.copy_and_resolve_references()
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
            if len(set(steps)) < len(steps) or max(steps) >= LONGEST:
                raise UserError(f"config.{section_name}.{stem}: {given} makes the steps {steps}")
            section[f"{stem}_steps"] = steps if isinstance(given, tuple) else steps[0]
            section[key], section[f"{stem}_examples"] = type(epochs)(), type(examples)()
    return c
