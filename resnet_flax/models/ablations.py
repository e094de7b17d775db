"""What Identity Mappings [I] compares its nets with, on ResNet-110 with post-activation blocks.

The shortcuts of [I, Table 1, Fig. 2], as functions like those of `blocks`. All but the 1x1
convolution (`blocks.bare_projection` everywhere, without the batch normalisation of option C) are
[R]'s option A with something done to it: [I] does not say what changes the shape.

And the orders of [I, Table 2, Fig. 4] as blocks; "full pre-activation" is
`blocks.PreactBasicBlock`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import deferred
from resnet_flax.models.activation import relu
from resnet_flax.models.blocks import BasicBlock, Block, gate, option_a


def constant_scaling(x, y, strides, conv, norm):
    """Both times 0.5 [I, Fig. 2b]: 12.35 % in [I, Table 1], the original 6.61 %."""
    del conv, norm
    x, y = deferred.array(x), deferred.array(y)
    return 0.5 * option_a(x, strides, y.shape[-1]) + 0.5 * y


def exclusive_gating(x, y, strides, conv, norm, *, gate_bias):
    """The branch times g(x), the shortcut times 1 - g(x) [I, Fig. 2c], as in a highway net.

    [I, Table 1] has 8.70 % at best, with a bias of -6 to begin with.
    """
    del norm
    x, y = deferred.array(x), deferred.array(y)
    g = gate(x, y.shape[-1], strides, conv, gate_bias)
    x, wide_y = (v.astype(jnp.float32) for v in (x, y))
    return ((1 - g) * option_a(x, strides, y.shape[-1]) + g * wide_y).astype(y.dtype)


def shortcut_gating(x, y, strides, conv, norm, *, gate_bias):
    """Only the shortcut times 1 - g(x) [I, Fig. 2d].

    [I, Table 1] has 12.86 % with a bias of 0 to begin with, 6.91 % with -6.
    """
    del norm
    x, y = deferred.array(x), deferred.array(y)
    g = gate(x, y.shape[-1], strides, conv, gate_bias)
    shortcut = option_a(x.astype(jnp.float32), strides, y.shape[-1])
    return ((1 - g) * shortcut).astype(y.dtype) + y


class DropoutShortcutBlock(BasicBlock):
    """The original block with dropout of one half on its shortcut's output [I, Fig. 2f].

    In the form of dropout that [I §3.1] describes: half of the values are 0 in training, which
    scales the shortcut by 0.5 in expectation, and all are halved at test. It fails to converge
    there.
    """

    draws = True

    def join(self, x, y, survival):
        """Adds the thinned shortcut to the branch."""
        shortcut = super().join(x, jnp.zeros_like(y), None)
        kept = shortcut * self.keep(0.5, shortcut.shape).astype(shortcut.dtype)
        if survival is not None:
            y = y * self.keep(survival, ()).astype(y.dtype)
        return kept + y


class BNAfterAdditionBlock(Block):
    """conv3-BN-ReLU-conv3, shortcut, BN-ReLU [I, Fig. 4b]: 8.17 %."""

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        y = self.conv(self.features, strides=self.strides, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, name="conv2")(y)
        return relu(self.norm(name="bn2")(self.join(x, y, survival)))


class ReLUBeforeAdditionBlock(Block):
    """conv3-BN-ReLU-conv3-BN-ReLU, shortcut [I, Fig. 4c]: 7.84 %.

    Its last scale cannot begin at 0: behind a ReLU it would stay there.
    """

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        y = self.conv(self.features, strides=self.strides, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y))
        return self.join(x, y, survival)


class ReLUOnlyPreactBlock(Block):
    """ReLU-conv3-BN-ReLU-conv3-BN, shortcut [I, Fig. 4d]: 6.71 %.

    The first ReLU is shared by branch and shortcut where the shape changes; after the last block
    there is one more, as with full pre-activation [I, Appendix].
    """

    preactivation = True
    ends_in_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        y = relu(x)
        x = y if self.shares_activation else x
        y = self.conv(self.features, strides=self.strides, name="conv1")(y)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, name="conv2")(y)
        y = self.norm(name="bn2", scale_init=self.last_scale_init)(y)
        return self.join(x, y, survival)


BLOCKS: dict[str, type[Block]] = {
    "dropout_shortcut": DropoutShortcutBlock,
    "bn_after_addition": BNAfterAdditionBlock,
    "relu_before_addition": ReLUBeforeAdditionBlock,
    "relu_only_preact": ReLUOnlyPreactBlock,
}
