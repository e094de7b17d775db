"""Every net by its name."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_flax.errors import UserError
from resnet_flax.models import blocks, variants
from resnet_flax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a name stands for; everything else about a net is an option."""

    stage_sizes: tuple[int, ...]  # blocks per stage
    widths: tuple[int, ...]  # of each stage's 3x3 convolutions
    block: type[blocks.Block]
    shortcut: str  # "A", "B" or "C", the paper's choice; or another key of `_SHORTCUTS`, fixed
    image_size: int = 32  # side of the images the net is for, pixels
    num_classes: int = 10  # of the data set the net is for
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # arguments of `ResNet`

    @property
    def weighted_layers(self) -> int:
        """Layers on the longest path that have weights: projections do not count [R Fig. 3]."""
        return 2 + sum(self.stage_sizes) * len(self.block.kernels)

    @property
    def scan_pays(self) -> bool:
        """Whether the net is so deep that, unrolled, it would take minutes to compile."""
        return max(self.stage_sizes) > 40


def _cifar(
    depth: int, block: type[blocks.Block], shortcut: str, widths=(16, 32, 64), **extra: Any
) -> Architecture:
    """The CIFAR net of `depth` layers [R §4.2]: 6n+2 with basic blocks, 9n+2 with bottlenecks."""
    n = (depth - 2) // (3 * len(block.kernels))
    return Architecture((n, n, n), widths, block, shortcut, extra=extra)


def _imagenet(sizes: tuple[int, ...], block: type[blocks.Block], shortcut: str) -> Architecture:
    """A net of [R §4.1, Table 1]: 7x7 convolution of stride 2, max-pool, four stages."""
    stem = {"stem_kernel": 7, "stem_strides": 2, "stem_pool": True}
    return Architecture(sizes, (64, 128, 256, 512), block, shortcut, 224, 1000, stem)


# Depth 8 (n = 1) is not in the paper: it is there for trying things out.
_CIFAR = (
    ("resnet{}", (8, 20, 32, 44, 56, 110, 1202), blocks.BasicBlock, "A", {}),
    ("plain{}", (20, 32, 44, 56, 110), blocks.BasicBlock, "none", {}),
    ("highway{}", (20, 32, 44, 56, 110), variants.HighwayLayer, "highway", {}),
    ("resnet{}_bottleneck", (20, 47, 164, 1001), blocks.BottleneckBlock, "B", {}),
    ("resnet{}_preact", (20, 32, 44, 56, 110), blocks.PreactBasicBlock, "B", {}),
    ("resnet{}_preact", (47, 164, 1001), blocks.PreactBottleneckBlock, "B", {}),
    ("resnet{}_keras_v1", (20, 32, 44, 56, 110), blocks.BasicBlock, "bare", variants.KERAS_V1),
    ("resnet{}_keras_v2", (56, 110), variants.KerasPreactBlock, "bare", variants.KERAS_V2),
    ("resnet{}_constant_scaling", (110,), variants.ConstantScalingBlock, "constant_scaling", {}),
    ("resnet{}_exclusive_gating", (110,), variants.ExclusiveGatingBlock, "exclusive_gating", {}),
    ("resnet{}_shortcut_gating", (110,), variants.ShortcutGatingBlock, "shortcut_gating", {}),
    ("resnet{}_conv_shortcut", (110,), blocks.BasicBlock, "conv_shortcut", {}),
    ("resnet{}_dropout_shortcut", (110,), variants.DropoutShortcutBlock, "A", {}),
    ("resnet{}_bn_after_addition", (110,), variants.BNAfterAdditionBlock, "A", {}),
    ("resnet{}_relu_before_addition", (110,), variants.ReLUBeforeAdditionBlock, "A", {}),
    ("resnet{}_relu_only_preact", (110,), variants.ReLUOnlyPreactBlock, "A", {}),
)
_IMAGENET = {
    "resnet18": _imagenet((2, 2, 2, 2), blocks.BasicBlock, "B"),
    "plain18": _imagenet((2, 2, 2, 2), blocks.BasicBlock, "none"),
    "resnet34": _imagenet((3, 4, 6, 3), blocks.BasicBlock, "B"),
    "plain34": _imagenet((3, 4, 6, 3), blocks.BasicBlock, "none"),
    "resnet50": _imagenet((3, 4, 6, 3), blocks.BottleneckBlock, "B"),
    "resnet101": _imagenet((3, 4, 23, 3), blocks.BottleneckBlock, "B"),
    "resnet152": _imagenet((3, 8, 36, 3), blocks.BottleneckBlock, "B"),
}
ARCHITECTURES: dict[str, Architecture] = {
    name.format(depth): _cifar(depth, block, shortcut, **extra)
    for name, depths, block, shortcut, extra in _CIFAR
    for depth in depths
} | _IMAGENET

OPTIONS = ("A", "B", "C")  # the user's choice, where a net leaves it
_OPTION_A = blocks.pad_identity, blocks.identity
# Shortcuts of blocks that change the shape, and of the others.
_SHORTCUTS = {
    "A": _OPTION_A,
    "B": (blocks.projection, blocks.identity),
    "C": (blocks.projection, blocks.projection),
    "none": (None, None),
    "highway": (None, blocks.identity),
    "constant_scaling": _OPTION_A,
    "exclusive_gating": _OPTION_A,
    "shortcut_gating": _OPTION_A,
    "conv_shortcut": (blocks.bare_projection, blocks.bare_projection),
    "bare": (blocks.bare_projection, blocks.identity),
}


def get_architecture(name: str) -> Architecture:
    """The architecture called `name`; a UserError suggests the nearest name."""
    if name not in ARCHITECTURES:
        # Nearly all names are much alike: of the closest ones, take the one of the nearest depth.
        close = difflib.get_close_matches(str(name).lower(), ARCHITECTURES, n=8)
        near = min(close, key=lambda other: abs(_depth(other) - _depth(str(name))), default=None)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise UserError(
            f"unknown model {name!r}{hint}; python -m resnet_flax.tools.summary --list shows all"
        )
    return ARCHITECTURES[name]


def _depth(name: str) -> int:
    return int("".join(filter(str.isdigit, name)) or 0)


def resolve_shortcut(name: str, shortcut: str | None) -> str:
    """The shortcut option in force: the paper's for this net where `shortcut` is None or "auto".

    Raises:
      UserError: unknown net or option, or the net leaves no choice.
    """
    own = get_architecture(name).shortcut
    # "A" is what every other 6n+2 net has: asking for it changes nothing in a plain one.
    if shortcut in (None, "auto", own) or (own, shortcut) == ("none", "A"):
        return own
    if own == "none":
        raise UserError(
            f"model {name!r} is plain and has no shortcuts: leave out shortcut={shortcut!r}, "
            f"or take {name.replace('plain', 'resnet')!r}"
        )
    if own not in OPTIONS:
        raise UserError(f"model {name!r} has shortcuts of its own: leave out shortcut={shortcut!r}")
    if shortcut not in OPTIONS:
        raise UserError(f"unknown shortcut {shortcut!r} for model {name!r}; known: A, B, C")
    return shortcut


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    shortcut: str | None = None,
    dtype: DTypeLike = jnp.float32,
    zero_init_last: bool = False,
    survival: float = 1.0,
    **options: Any,
) -> ResNet:
    """Builds a net by name: `create_model("resnet20").init(key, images)`.

    Args:
      name: one of `ARCHITECTURES`.
      num_classes: 0: the net returns pooled features; None: 10 for a CIFAR net, 1000 for ImageNet.
      shortcut: "A" identity padded with zeros, "B" projection where the shape changes, "C"
        projection everywhere; None takes the paper's: A for 6n+2 nets [R §4.2], B for bottleneck
        [R §4.1] and pre-activation nets [I] (there without batch normalisation).
      dtype: of activations, float32 or bfloat16 (or their names); parameters stay float32.
      zero_init_last: each block begins as its shortcut.
      survival: stochastic depth's probability for the last block; 1 turns it off.
      **options: other attributes of `ResNet`: `stride_in_3x3`, `gate_bias`, `bn_momentum`,
        `bn_group_size`, `scan`, `remat`, `cpu_convolutions`, `defer`, `fused`.

    Raises:
      TypeError: `ResNet` has no such option.
      UserError: a value is unknown or out of range, or the net cannot have the option.
    """
    architecture = get_architecture(name)
    block = architecture.block
    num_classes = architecture.num_classes if num_classes is None else num_classes
    if num_classes < 0:
        raise UserError(f"num_classes={num_classes} must be 0 (pooled features) or more")
    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise UserError(f"unknown dtype {dtype!r}; known: float32, bfloat16")
    if not 0 < survival <= 1:
        raise UserError(f"survival={survival} must be above 0 and at most 1")
    if survival < 1 and architecture.shortcut in ("none", "highway"):
        raise UserError(
            f"model {name!r} has plain layers: one dropped would leave nothing (survival)"
        )
    if zero_init_last and (architecture.shortcut == "none" or not block.ends_in_norm):
        raise UserError(
            f"model {name!r} has no branches that end in batch normalisation beside a shortcut: "
            "leave out zero_init_last"
        )
    return ResNet(
        stage_sizes=architecture.stage_sizes,
        widths=architecture.widths,
        block=block,
        shortcuts=_SHORTCUTS[resolve_shortcut(name, shortcut)],
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        zero_init_last=zero_init_last,
        survival=survival,
        **architecture.extra,
        **options,
    )
