"""The net: stem, stages of blocks, head."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from resnet_flax.models import deferred
from resnet_flax.models.blocks import Block, Shortcut
from resnet_flax.models.layers import BatchNorm, Conv, he_normal, relu


class ResNet(nn.Module):
    """The nets of [R §4]: a convolution, stages of blocks, global average pool, dense.

    Parameters and batch statistics are named `stem_conv`, `stem_bn`, `stage<s>_block<b>` (both from
    1), `final_bn` (pre-activation nets) and `head`. With `scan`, blocks 2 to n of a stage, which
    are alike, run as one `lax.scan` and their variables are stacked under `stage<s>_rest`;
    `models.layout` converts between the two. Without it, compiling a net of a thousand layers takes
    many minutes.
    """

    stage_sizes: tuple[int, ...]  # blocks per stage
    widths: tuple[int, ...]  # of each stage's 3x3 convolutions; the first is the stem's too
    block: type[Block]
    shortcuts: tuple[Shortcut | None, Shortcut | None]  # see `Block`
    out_widths: tuple[int, ...] | None = None  # None: `widths` times the block's `expansion`
    num_classes: int = 10  # 0: no dense layer, the net returns pooled features
    stem_kernel: int = 3  # 7 for ImageNet
    stem_strides: int = 1
    stem_pool: bool = False  # a 3x3 max-pool of stride 2 follows the stem
    # Every block starts as its shortcut (Goyal et al. 2017, arXiv:1706.02677): the scale that ends
    # a branch starts at 0. Not the papers'.
    zero_init_last: bool = False
    stride_in_3x3: bool = False  # see `Block`, as `gate_bias`
    gate_bias: float = -6.0
    conv: Callable[..., nn.Module] = Conv
    head_init: nn.initializers.Initializer = he_normal
    dtype: DTypeLike = jnp.float32  # of activations; all else, logits too, is float32
    bn_momentum: float = 0.9  # see `BatchNorm`
    bn_epsilon: float = 1e-5
    bn_group_size: int | None = None
    # Stochastic depth (arXiv:1603.09382; 0.5 there): the probability that the last block's branch
    # takes part in a training step. It falls linearly over the blocks from 1.
    survival: float = 1.0
    scan: bool = False  # run equal blocks as one scan
    # Keep only block inputs for the backward pass and recompute the rest. On a CPU it saves memory
    # with `scan` only, see results/performance.md.
    remat: bool = False
    cpu_convolutions: bool = False  # by `cpu_convolution`: no forward-mode derivatives
    # In training, compute activations where they are used (`deferred`), and with `fused` 3x3
    # convolutions of 16 to 64 channels by `fused`, on a GPU. Not with `scan`, `remat` or `draws`.
    defer: bool = False
    fused: bool = False

    @property
    def defers(self) -> bool:
        """Whether training defers, where `defer` asks for it."""
        return self.defer and not (self.scan or self.remat or self.draws)

    @property
    def uses_fused(self) -> bool:
        """Whether training uses `fused`."""
        return self.fused and self.defers

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers: `apply(…, train=True, rngs={"drop": key})`."""
        return self.survival < 1 or self.block.draws

    def survivals(self) -> list[Sequence[np.float32 | None]]:
        """Each stage's probabilities that a block's branch takes part: [blocks], or Nones.

        They are 1 - l / L * (1 - survival) for block l of L.
        """
        total = sum(self.stage_sizes)
        blocks = np.float32(1 - np.arange(1, total + 1) / total * (1 - self.survival))
        blocks = np.full(total, None) if self.survival == 1 else blocks
        return np.split(blocks, np.cumsum(self.stage_sizes)[:-1])

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, features: bool = False
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Returns float32 logits [B, num_classes] of normalised images [B, H, W, C].

        Args:
          x: the images.
          train: normalise by batch statistics, for which `batch_stats` must be mutable, and draw
            random numbers if `rngs` has a key `drop`, see `Block`.
          features: return each stage's output instead, [B, H/s, W/s, D] in the net's dtype, for a
            detection or segmentation head; the last one after the final ReLU.

        Returns:
          Logits; with `num_classes=0` the pooled features, float32 [B, D].
        """
        conv = functools.partial(
            self.conv,
            dtype=self.dtype,
            cpu_convolutions=self.cpu_convolutions,
            fused=self.uses_fused and train,
        )
        norm = functools.partial(
            BatchNorm,
            train=train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            group_size=self.bn_group_size,
            dtype=self.dtype,
            defer=self.defers and train,
        )
        starts_at_0 = self.zero_init_last and self.block.ends_in_norm
        make_block = functools.partial(
            self.block,
            conv=conv,
            norm=norm,
            shortcuts=self.shortcuts,
            stride_in_3x3=self.stride_in_3x3,
            last_scale_init=nn.initializers.zeros if starts_at_0 else nn.initializers.ones,
            gate_bias=self.gate_bias,
            train=train,
        )
        stem = {"kernel": self.stem_kernel, "strides": self.stem_strides}
        x = conv(self.widths[0], **stem, name="stem_conv")(x)
        if self.block.stem_activation:
            x = relu(norm(name="stem_bn")(x))
        if self.stem_pool:
            # SAME would pad one side only, as with convolutions.
            x = nn.max_pool(deferred.array(x), (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

        outputs, run = [], nn.remat(_call) if self.remat else _call
        out_widths = self.out_widths or tuple(w * self.block.expansion for w in self.widths)
        stages = zip(self.stage_sizes, self.widths, out_widths, self.survivals(), strict=True)
        for stage, (size, width, out_width, survivals) in enumerate(stages, 1):
            block = functools.partial(make_block, width, out_width)
            strides = 1 if stage == 1 else 2
            first = block(strides=strides, is_first=stage == 1, name=f"stage{stage}_block1")
            x = run(first, x, survivals[0])
            if self.scan and size > 1:
                x = self._scan(block(name=f"stage{stage}_rest"), x, survivals[1:])
            else:
                for i in range(1, size):
                    x = run(block(name=f"stage{stage}_block{i + 1}"), x, survivals[i])
            outputs.append(x)

        if self.block.norm_first:
            x = norm(name="final_bn")(x)
        if self.block.preactivation:
            outputs[-1] = x = relu(x)
        if features:
            return tuple(map(deferred.array, outputs))
        x = deferred.array(x)
        if not train and jnp.dtype(self.dtype) != jnp.float32:
            # jaxlib 0.11.2 merges the last convolutions into this sum on a CPU, and what comes out
            # in bfloat16 is garbage: NaN, mostly.
            x = jax.lax.optimization_barrier(x)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        if not self.num_classes:
            return x
        return nn.Dense(self.num_classes, kernel_init=self.head_init, name="head")(x)

    def _scan(self, block, x, survivals):
        # Inside a scan the loop already keeps XLA from merging the two computations.
        call = nn.remat(_call, prevent_cse=False) if self.remat else _call
        scanned = nn.scan(
            lambda block, x, survival: (call(block, x, survival), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "drop": True},
            length=len(survivals),
        )
        return scanned(block, x, None if self.survival == 1 else jnp.asarray(survivals))[0]


def _call(block, x, survival):
    return block(x, survival)


def without_survival(model: ResNet, variables: dict[str, Any]) -> dict[str, Any]:
    """Canonical variables for `model` without stochastic depth that give its outputs in evaluation.

    A branch's last layer takes the block's survival: a normalisation's scale and bias, or a
    convolution's kernel.
    """
    if model.survival == 1:
        return variables
    params = dict(variables["params"])
    kind = "bn" if model.block.ends_in_norm else "conv"
    for stage, survivals in enumerate(model.survivals(), 1):
        for number, survival in enumerate(survivals, 1):
            block = params[f"stage{stage}_block{number}"]
            last = max(layer for layer in block if layer.startswith(kind))
            scaled = jax.tree.map(lambda x, s=survival: np.asarray(x) * s, block[last])
            params[f"stage{stage}_block{number}"] = {**block, last: scaled}
    return {**variables, "params": params}
