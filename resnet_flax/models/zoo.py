"""Every net by its name."""

import dataclasses
import difflib
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_flax.errors import UserError
from resnet_flax.models import ablations, blocks, highway, keras
from resnet_flax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a name stands for; everything else about a net is an option.

    Attributes:
      stage_sizes: blocks per stage.
      widths: width of each stage's 3x3 convolutions.
      block: class of the blocks.
      shortcut: "A", "B" or "C": the paper's choice for this net; or another key of `_SHORTCUTS`,
        which then is the net and no option.
      image_size: side of the square images the net is for, pixels.
      num_classes: classes of the data set the net is for.
      extra: further arguments of `ResNet`.
    """

    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    block: type[blocks.Block]
    shortcut: str
    image_size: int = 32
    num_classes: int = 10
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weighted_layers(self) -> int:
        """Layers on the longest path that have weights: projections do not count [R Fig. 3]."""
        return 2 + sum(self.stage_sizes) * self.block.weighted_layers

    @property
    def scan_pays(self) -> bool:
        """Whether the net is so deep that, unrolled, it would take minutes to compile."""
        return max(self.stage_sizes) > 40


def cifar_architecture(depth: int, block: type[blocks.Block], shortcut: str) -> Architecture:
    """The CIFAR net of `depth` layers [R §4.2]: 6n+2 with basic blocks, 9n+2 with bottlenecks.

    With blocks of one layer 3n+2.

    Raises:
      ValueError: no such n.
    """
    n, rest = divmod(depth - 2, 3 * block.weighted_layers)
    if n < 1 or rest:
        raise ValueError(f"depth={depth} is not {3 * block.weighted_layers}n + 2 with n >= 1")
    return Architecture((n, n, n), (16, 32, 64), block, shortcut)


def imagenet_architecture(
    stage_sizes: tuple[int, ...], block: type[blocks.Block], shortcut: str
) -> Architecture:
    """A net of [R §4.1, Table 1]: 7x7 convolution of stride 2, max-pool, four stages."""
    stem = {"stem_kernel": 7, "stem_strides": 2, "stem_pool": True}
    return Architecture(stage_sizes, (64, 128, 256, 512), block, shortcut, 224, 1000, stem)


def _architectures() -> dict[str, Architecture]:
    nets = {}
    # Depth 8 (n = 1) is not in the paper: it is there for trying things out.
    for depth in (8, 20, 32, 44, 56, 110, 1202):
        nets[f"resnet{depth}"] = cifar_architecture(depth, blocks.BasicBlock, "A")
    for depth in (20, 32, 44, 56, 110):
        nets[f"plain{depth}"] = cifar_architecture(depth, blocks.BasicBlock, "none")
    for depth in (20, 32, 44, 56, 110):
        nets[f"highway{depth}"] = cifar_architecture(depth, highway.HighwayLayer, "highway")
    for depth in (20, 47, 164, 1001):
        name = f"resnet{depth}_bottleneck"
        nets[name] = cifar_architecture(depth, blocks.BottleneckBlock, "B")
    for depth in (20, 32, 44, 56, 110):
        nets[f"resnet{depth}_preact"] = cifar_architecture(depth, blocks.PreactBasicBlock, "B")
    for depth in (47, 164, 1001):
        nets[f"resnet{depth}_preact"] = cifar_architecture(depth, blocks.PreactBottleneckBlock, "B")
    for depth, sizes in ((18, (2, 2, 2, 2)), (34, (3, 4, 6, 3))):
        nets[f"resnet{depth}"] = imagenet_architecture(sizes, blocks.BasicBlock, "B")
        nets[f"plain{depth}"] = imagenet_architecture(sizes, blocks.BasicBlock, "none")
    for depth, sizes in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3))):
        nets[f"resnet{depth}"] = imagenet_architecture(sizes, blocks.BottleneckBlock, "B")
    for depth in (20, 32, 44, 56, 110):
        net = cifar_architecture(depth, blocks.BasicBlock, "bare")
        nets[f"resnet{depth}_keras_v1"] = dataclasses.replace(net, extra=keras.V1)
    for depth in (56, 110):
        net = cifar_architecture(depth, keras.KerasPreactBlock, "bare")
        net = dataclasses.replace(net, widths=keras.V2_WIDTHS, extra=keras.V2)
        nets[f"resnet{depth}_keras_v2"] = net
    for name, block in ablations.BLOCKS.items():
        nets[f"resnet110_{name}"] = cifar_architecture(110, block, "A")
    for name in ("constant_scaling", "exclusive_gating", "shortcut_gating", "conv_shortcut"):
        nets[f"resnet110_{name}"] = cifar_architecture(110, blocks.BasicBlock, name)
    return nets


ARCHITECTURES = _architectures()

# What users may choose between, where a net leaves them the choice.
OPTIONS = ("A", "B", "C")
# (shortcut of blocks that change the shape, shortcut of the others), post- and pre-activation.
_SHORTCUTS = {
    "A": (blocks.pad_identity, blocks.identity),
    "B": (blocks.projection, blocks.identity),
    "C": (blocks.projection, blocks.projection),
    "none": (blocks.no_shortcut, blocks.no_shortcut),
    "bare": (blocks.bare_projection, blocks.identity),
    "constant_scaling": (ablations.constant_scaling, ablations.constant_scaling),
    "conv_shortcut": (blocks.bare_projection, blocks.bare_projection),
    "exclusive_gating": (ablations.exclusive_gating, ablations.exclusive_gating),
    "shortcut_gating": (ablations.shortcut_gating, ablations.shortcut_gating),
    "highway": (blocks.no_shortcut, highway.highway),
}
# These take a further argument, `gate_bias`.
_GATED = (ablations.exclusive_gating, ablations.shortcut_gating, highway.highway)
_PREACT_SHORTCUTS = {
    "A": (blocks.pad_identity, blocks.identity),
    "B": (blocks.bare_projection, blocks.identity),
    "C": (blocks.bare_projection, blocks.bare_projection),
    "bare": (blocks.bare_projection, blocks.identity),
}


def get_architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
      UserError: there is none; the message suggests the nearest name.
    """
    if name not in ARCHITECTURES:
        # Nearly all names are much alike: of the closest ones, that of the nearest depth.
        close = difflib.get_close_matches(str(name).lower(), ARCHITECTURES, n=8)
        near = min(close, key=lambda n: abs(_depth(n) - _depth(str(name))), default=None)
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
      UserError: unknown net or option, or a projection asked of a plain net.
    """
    own = get_architecture(name).shortcut
    if shortcut in (None, "auto", own):
        return own
    if own == "none":
        # "A" is what every other 6n+2 net has: asking for it changes nothing in a plain one.
        if shortcut != "A":
            raise UserError(
                f"model {name!r} is plain and has no shortcuts: leave out shortcut={shortcut!r}, "
                f"or take {name.replace('plain', 'resnet')!r}"
            )
        return own
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
    stride_in_3x3: bool = False,
    bn_momentum: float = 0.9,
    bn_group_size: int | None = None,
    zero_init_last: bool = False,
    gate_bias: float = -6.0,
    survival: float = 1.0,
    scan: bool = False,
    remat: bool = False,
    cpu_convolutions: bool = False,
    defer: bool = False,
    kernels: bool = False,
) -> ResNet:
    """Builds a net by name: `create_model("resnet20").init(key, images)`.

    Args:
      name: one of `ARCHITECTURES`.
      num_classes: outputs of the last layer; 0: none, the pooled features come out; None: 10 for
        a CIFAR net, 1000 for an ImageNet net.
      shortcut: "A" identity padded with zeros, "B" projection where the shape changes, "C"
        projection everywhere; None takes the paper's: A for 6n+2 nets [R §4.2], B for bottleneck
        [R §4.1] and pre-activation nets [I] (there without batch normalisation).
      dtype: of activations, float32 or bfloat16 (or their names); parameters stay float32.
      stride_in_3x3: put a bottleneck's stride in the 3x3 and not in the first 1x1.
      bn_momentum: share of the running statistics kept at each step.
      bn_group_size: examples per batch-norm group, None for the whole batch.
      zero_init_last: see `ResNet`; not the paper's.
      gate_bias: initial bias of the gates of the nets that have them; see `models.ablations` and
        `models.highway`.
      survival: probability that the last block takes part in a training step, see `ResNet`: 0.5 in
        the paper on stochastic depth, 1 in all others; applied in training where `apply` is given
        `rngs={"drop": key}`, in expectation everywhere else.
      scan: run equal blocks as one scan; see `ResNet` for what that does to the variables.
      remat: trade computation for memory in the backward pass.
      cpu_convolutions: another way to compute convolutions, faster on a CPU; see `ResNet`.
      defer: another way to compute batch normalisation, faster on a GPU; see `ResNet`.
      kernels: another way to compute convolutions, for one GPU; see `ResNet`.

    Returns:
      A linen module mapping [B, H, W, C] to float32 logits [B, num_classes]; its call takes
      `train` and `features`, see `ResNet`.

    Raises:
      UserError: unknown name, shortcut or dtype, num_classes < 0, a survival that is no
        probability, or below 1 in a net without shortcuts, or zero_init_last where there is no such
        scale.
    """
    architecture = get_architecture(name)
    if num_classes is None:
        num_classes = architecture.num_classes
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
    if zero_init_last and (architecture.shortcut == "none" or not architecture.block.ends_in_norm):
        raise UserError(
            f"model {name!r} has no branches that end in batch normalisation beside a shortcut: "
            "leave out zero_init_last"
        )
    shortcuts = _PREACT_SHORTCUTS if architecture.block.preactivation else _SHORTCUTS
    option = resolve_shortcut(name, shortcut)
    changing, same = (
        functools.partial(function, gate_bias=gate_bias) if function in _GATED else function
        for function in shortcuts[option]
    )
    return ResNet(
        stage_sizes=architecture.stage_sizes,
        widths=architecture.widths,
        block=architecture.block,
        shortcut_changing=changing,
        shortcut_same=same,
        num_classes=num_classes,
        stride_in_3x3=stride_in_3x3,
        dtype=jnp.dtype(dtype),
        bn_momentum=bn_momentum,
        bn_group_size=bn_group_size,
        zero_init_last=zero_init_last,
        **architecture.extra,
        survival=survival,
        scan=scan,
        remat=remat,
        cpu_convolutions=cpu_convolutions,
        defer=defer,
        kernels=kernels,
    )
