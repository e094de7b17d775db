"""Nets that the papers compare with, and the nets of the Keras tutorial."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import deferred
from resnet_flax.models.blocks import BasicBlock, Block, PreactBottleneckBlock
from resnet_flax.models.layers import Conv, relu

# What Identity Mappings [I] compares its nets with, on ResNet-110 with post-activation blocks. [I]
# does not say what changes the shape: here it is [R]'s option A, scaled, gated or thinned out like
# the identity. "Full pre-activation" is `blocks.PreactBasicBlock`.


class ConstantScalingBlock(BasicBlock):
    """Shortcut and branch times 0.5 [I, Fig. 2b]: 12.35 % in [I, Table 1], the original 6.61 %."""

    def _join(self, x, y, survival):
        return 0.5 * self._shortcut(x) + 0.5 * deferred.array(self._drop(y, survival))


class ExclusiveGatingBlock(BasicBlock):
    """Branch times g(x), shortcut times 1 - g(x) [I, Fig. 2c], as in a highway net.

    [I, Table 1] has 8.70 % at best, with an initial bias of -6.
    """

    gate_kernel = 1

    def _join(self, x, y, survival):
        x, y = deferred.array(x), deferred.array(self._drop(y, survival))
        g = self._gate(x)
        shortcut = self._shortcut(x.astype(jnp.float32))
        return ((1 - g) * shortcut + g * y.astype(jnp.float32)).astype(y.dtype)

    def _gate(self, x):
        """sigmoid(W x + b), float32 [B, H/s, W/s, D]; W a convolution, b starts at `gate_bias`."""
        layer = self.conv(
            self.out_features,
            kernel=self.gate_kernel,
            strides=self.strides,
            bias_init=nn.initializers.constant(self.gate_bias),
            name="gate_conv",
        )
        # In bfloat16 1 - g would be 1 for any g below 0.002.
        return jax.nn.sigmoid(layer(x).astype(jnp.float32))


class ShortcutGatingBlock(ExclusiveGatingBlock):
    """Only the shortcut times 1 - g(x) [I, Fig. 2d].

    [I, Table 1] has 12.86 % with an initial bias of 0, 6.91 % with -6.
    """

    def _join(self, x, y, survival):
        x, y = deferred.array(x), deferred.array(self._drop(y, survival))
        g = self._gate(x)
        return ((1 - g) * self._shortcut(x.astype(jnp.float32))).astype(y.dtype) + y


class DropoutShortcutBlock(BasicBlock):
    """Dropout of one half on the shortcut's output [I, Fig. 2f]; it fails to converge there.

    As [I §3.1] describes it: half of the values are 0 in training, which scales the shortcut by 0.5
    in expectation, and all are halved at test.
    """

    draws = True

    def _join(self, x, y, survival):
        shortcut = self._shortcut(x)
        shortcut = shortcut * self._keep(0.5, shortcut.shape).astype(shortcut.dtype)
        return shortcut + self._drop(y, survival)


class BNAfterAdditionBlock(Block):
    """conv3-BN-ReLU-conv3, shortcut, BN-ReLU [I, Fig. 4b]: 8.17 % in [I, Table 2]."""

    def _end(self, x):
        return relu(self._last_norm(x))


class ReLUBeforeAdditionBlock(Block):
    """conv3-BN-ReLU-conv3-BN-ReLU, shortcut [I, Fig. 4c]: 7.84 % in [I, Table 2].

    Its last scale cannot start at 0: behind a ReLU it would stay there.
    """

    def _branch(self, x):
        return relu(self._last_norm(super()._branch(x)))

    def _end(self, x):
        return x


class ReLUOnlyPreactBlock(Block):
    """ReLU-conv3-BN-ReLU-conv3-BN, shortcut [I, Fig. 4d]: 6.71 % in [I, Table 2].

    The branch and the shortcut share the first ReLU where the shape changes; after the last block
    there is one more, as with full pre-activation [I, Appendix].
    """

    preactivation = True
    ends_in_norm = True

    def _activate(self, x):
        y = relu(x)
        return y if self.is_first or self._changes_shape(x) else x, y

    def _branch(self, x):
        return self._last_norm(super()._branch(x))


class HighwayLayer(ExclusiveGatingBlock):
    """One layer of a highway net (Srivastava et al. 2015, arXiv:1505.00387).

    `highway<6n+2>` is `plain<6n+2>` with a gate at each layer that keeps its input's shape: a layer
    H(x) = ReLU(BN(conv3(x))) becomes y = H(x) T(x) + x (1 - T(x)), T(x) = sigmoid(conv3(x) + b),
    with b negative at first, so that the input passes. The net's first convolution, and the layers
    that change the shape, stay plain, as in that paper, whose formula needs equal shapes.

    The published Highway-19 and Highway-32 that [R, Table 6] quotes are other nets: they have the
    layers and widths of FitNets, max-pooling, and no batch normalisation.
    """

    kernels = (3,)
    gate_kernel = 3
    ends_in_norm = False

    def _branch(self, x):
        return relu(super()._branch(x))

    def _join(self, x, y, survival):
        return y if self._changes_shape(x) else super()._join(x, y, survival)

    def _end(self, x):
        return x


# The nets of https://keras.io/examples/cifar10_resnet, versions 1 and 2, which many tutorials train
# under the papers' names. Unlike in the papers every convolution has a bias; padding is
# TensorFlow's `same`, on one side only where a 3x3 has stride 2; all initial kernels are a
# *truncated* normal; batch normalisation adds 1e-3 to the variance, and in that example's training
# keeps 0.99 of its running statistics (`bn_momentum=0.99`, see `configs/keras.py`).

_truncated = nn.initializers.he_normal()
# Arguments of `ResNet`. Version 1 has [R]'s 6n+2 layers with basic blocks. Where the shape changes,
# the shortcut is a 1x1 convolution without batch normalisation; [R §4.2] has option A.
KERAS_V1: dict[str, Any] = {
    "conv": functools.partial(
        Conv, kernel_init=_truncated, bias_init=nn.initializers.zeros, same=True
    ),
    "head_init": _truncated,
    "bn_epsilon": 1e-3,
}
# Version 2 has [I]'s 9n+2 layers with other widths: in [I] they are 16, 32, 64 and four times that.
KERAS_V2 = KERAS_V1 | {"widths": (16, 64, 128), "out_widths": (64, 128, 256)}


class KerasPreactBlock(PreactBottleneckBlock):
    """The unit of version 2: BN-ReLU never feeds the shortcut.

    The net's first block begins with its convolution: BN-ReLU stand before it, after the stem.
    """

    stem_activation = True

    def _activate(self, x):
        return x, x if self.is_first else relu(self.norm(name="bn1")(x))
