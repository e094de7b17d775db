"""The net: stem, stages of blocks, head."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from resnet_flax.models import deferred
from resnet_flax.models.activation import relu
from resnet_flax.models.blocks import Block, Conv, Shortcut, he_normal
from resnet_flax.models.norm import BatchNorm


class ResNet(nn.Module):
    """The nets of [R §4]: a convolution, stages of blocks, global average pool, dense.

    Parameters and batch statistics are named `stem_conv`, `stem_bn`, `stage<s>_block<b>` (both from
    1), `final_bn` (pre-activation nets) and `head`. With `scan`, blocks 2 to n of a stage, which
    are alike, run as one `lax.scan` and their variables lie stacked under `stage<s>_rest`;
    `models.layout` converts between the two. Without scanning, compiling a net of a thousand layers
    takes many minutes.

    Attributes:
      stage_sizes: blocks per stage.
      widths: width of each stage's 3x3 convolutions; the first is the stem's too.
      block: class of the blocks.
      shortcut_changing: shortcut of a block whose output has another shape than its input.
      shortcut_same: shortcut of every other block.
      out_widths: channels of each stage's output; None: `widths` times the block's `expansion`.
      num_classes: outputs of the dense layer; 0: no such layer, the pooled features come out.
      stem_kernel: size of the first convolution: 3, or 7 for ImageNet.
      stem_strides: its stride.
      stem_pool: follow it by a 3x3 max-pool of stride 2.
      zero_init_last: begin with the last scale of each branch that ends in batch normalisation at
        0, every block then being its shortcut (Goyal et al. 2017, arXiv:1706.02677); not the
        paper's.
      stride_in_3x3: a bottleneck's stride sits in its 3x3 convolution.
      conv: class of the convolutions, or a function that makes one.
      head_init: initialiser of the dense layer's kernel.
      dtype: of the activations; parameters, statistics and logits are float32 always.
      bn_momentum: share of the running statistics kept at each step.
      bn_epsilon: added to the variance.
      bn_group_size: examples per batch-norm group, None for the global batch.
      survival: probability that the last block's branch takes part in a training step; it falls
        linearly over the blocks from 1 (stochastic depth, Huang et al. 2016, arXiv:1603.09382).
      scan: run equal blocks as one scan.
      remat: keep only block inputs for the backward pass and compute the rest again. On a CPU it
        saves memory with `scan` only, see results/performance.md.
      cpu_convolutions: another way to compute convolutions, faster on a CPU and without
        forward-mode derivatives, see `cpu_convolution`.
      defer: in training, compute normalised activations where they are used, see `deferred`; faster
        on a GPU. Nets that cannot do so train as without.
      kernels: with `defer`, compute 3x3 convolutions of 16 to 64 channels by `kernels`.
    """

    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    block: type[Block]
    shortcut_changing: Shortcut
    shortcut_same: Shortcut
    out_widths: tuple[int, ...] | None = None
    num_classes: int = 10
    stem_kernel: int = 3
    stem_strides: int = 1
    stem_pool: bool = False
    zero_init_last: bool = False
    stride_in_3x3: bool = False
    conv: Callable[..., nn.Module] = Conv
    head_init: nn.initializers.Initializer = he_normal
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_group_size: int | None = None
    survival: float = 1.0
    scan: bool = False
    remat: bool = False
    cpu_convolutions: bool = False
    defer: bool = False
    kernels: bool = False

    @property
    def defers(self) -> bool:
        """Whether training defers, where `defer` asks for it."""
        return self.defer and not (self.scan or self.remat or self.draws)

    @property
    def uses_kernels(self) -> bool:
        """Whether training uses `kernels`."""
        return self.kernels and self.defers

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers: `apply(…, train=True, rngs={"drop": key})`."""
        return self.survival < 1 or self.block.draws

    def survivals(self) -> tuple[jax.Array | None, ...]:
        """Each stage's probabilities that a block's branch takes part, float32 [blocks], or None.

        1 - l / L * (1 - survival) for block l of L.
        """
        if self.survival == 1:
            return (None,) * len(self.stage_sizes)
        total = sum(self.stage_sizes)
        all_blocks = 1 - np.arange(1, total + 1) / total * (1 - self.survival)
        ends = np.cumsum(self.stage_sizes)
        return tuple(
            jnp.asarray(all_blocks[end - size : end], jnp.float32)
            for size, end in zip(self.stage_sizes, ends, strict=True)
        )

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, features: bool = False
    ) -> jax.Array | tuple[jax.Array, ...]:
        """Returns float32 logits [B, num_classes] of normalised images [B, H, W, C].

        Args:
          x: the images.
          train: normalise by batch statistics; `batch_stats` must be mutable. And draw what is
            random, where `rngs` has a key `drop`; else that stands at its expectation.
          features: return each stage's output instead, [B, H/s, W/s, D] in the net's dtype, for a
            detection or segmentation head. A pre-activation net's last one is after its final
            BN-ReLU.

        Returns:
          Logits; without `num_classes` the pooled features, float32 [B, D].
        """
        conv = functools.partial(
            self.conv,
            dtype=self.dtype,
            cpu_convolutions=self.cpu_convolutions,
            kernels=self.uses_kernels and train,
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
        last_scale_init = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        outputs = []
        x = conv(
            self.widths[0], kernel=self.stem_kernel, strides=self.stem_strides, name="stem_conv"
        )(x)
        if self.block.stem_activation:
            x = relu(norm(name="stem_bn")(x))
        if self.stem_pool:
            x = deferred.array(x)
            # Explicit padding: SAME would pad one side only, as with convolutions.
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        out_widths = self.out_widths or tuple(w * self.block.expansion for w in self.widths)
        stages = zip(self.stage_sizes, self.widths, out_widths, self.survivals(), strict=True)
        for stage, (size, width, out_width, survivals) in enumerate(stages, 1):
            strides = 1 if stage == 1 else 2
            changes = strides != 1 or x.shape[-1] != out_width
            block = functools.partial(
                self.block,
                width,
                out_width,
                conv=conv,
                norm=norm,
                stride_in_3x3=self.stride_in_3x3,
                last_scale_init=last_scale_init,
                train=train,
            )
            same = functools.partial(
                block,
                strides=1,
                is_first=False,
                shares_activation=False,
                shortcut=self.shortcut_same,
            )
            first = block(
                strides=strides,
                is_first=stage == 1,
                shares_activation=changes or stage == 1,
                shortcut=self.shortcut_changing if changes else self.shortcut_same,
                name=f"stage{stage}_block1",
            )
            x = self._run(first, x, None if survivals is None else survivals[0])
            if self.scan and size > 1:
                rest = None if survivals is None else survivals[1:]
                x = self._run_scanned(same(name=f"stage{stage}_rest"), x, rest, size - 1)
            else:
                for i in range(2, size + 1):
                    survival = None if survivals is None else survivals[i - 1]
                    x = self._run(same(name=f"stage{stage}_block{i}"), x, survival)
            outputs.append(x)
        if self.block.final_norm:
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

    def _run(self, block: Block, x: jax.Array, survival: jax.Array | None) -> jax.Array:
        return nn.remat(_call)(block, x, survival) if self.remat else block(x, survival)

    def _run_scanned(
        self, block: Block, x: jax.Array, survivals: jax.Array | None, length: int
    ) -> jax.Array:
        # Inside a scan the loop already keeps XLA from merging the two computations.
        call = nn.remat(_call, prevent_cse=False) if self.remat else _call
        scanned = nn.scan(
            lambda block, x, survival: (call(block, x, survival), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "drop": True},
            length=length,
        )
        return scanned(block, x, survivals)[0]


def _call(block: Block, x: jax.Array, survival: jax.Array | None) -> jax.Array:
    return block(x, survival)


def without_survival(model: ResNet, variables: dict[str, Any]) -> dict[str, Any]:
    """Variables that make a net without stochastic depth compute what `model` does at test.

    At test a branch counts as much as its block survives in training: its last layer takes that on,
    scale and bias of a normalisation, or the kernel of a convolution.

    Args:
      model: the net, with its `survival`.
      variables: its own, float32, in the canonical layout.
    """
    params = dict(variables["params"])
    for stage, survivals in enumerate(model.survivals(), 1):
        for number, survival in enumerate([] if survivals is None else np.asarray(survivals), 1):
            name = f"stage{stage}_block{number}"
            kind = "bn" if model.block.ends_in_norm else "conv"
            last = max(layer for layer in params[name] if layer.startswith(kind))
            scaled = jax.tree.map(lambda x, s=survival: np.asarray(x) * s, params[name][last])
            params[name] = {**params[name], last: scaled}
    return {**variables, "params": params}
