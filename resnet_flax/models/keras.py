"""The nets of Keras's CIFAR-10 example, which many tutorials train under the paper's names.

(https://keras.io/examples/cifar10_resnet, versions 1 and 2 of its ResNet.) In both, unlike in the
papers: every convolution has a bias; padding is TensorFlow's `same`, on one side only where a 3x3
has stride 2; the initial kernels are a *truncated* normal, the dense layer's too; batch
normalisation adds 1e-3 to the variance, and in that example's training keeps 0.99 of its running
statistics (`bn_momentum=0.99`, see `configs/keras.py`).

Version 1 has [R]'s 6n+2 layers with basic blocks; where the shape changes, the shortcut is a 1x1
convolution with a bias and without batch normalisation, where [R §4.2] has option A.

Version 2 has [I]'s 9n+2 layers, but other widths: middle ones of 16, 64 and 128, outputs of 64, 128
and 256 (in [I] 16, 32, 64 and four times that); and the shortcuts where the shape changes branch
off before the first BN-ReLU of their block, in [I, Appendix] after it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax

from resnet_flax.models.activation import relu
from resnet_flax.models.blocks import Block, Conv

conv = functools.partial(
    Conv,
    kernel_init=nn.initializers.he_normal(),
    bias_init=nn.initializers.zeros,
    same=True,
)

# Arguments of `ResNet`.
V1: dict[str, Any] = {
    "conv": conv,
    "head_init": nn.initializers.he_normal(),
    "bn_epsilon": 1e-3,
}
V2: dict[str, Any] = {**V1, "out_widths": (64, 128, 256)}
V2_WIDTHS = (16, 64, 128)


class KerasPreactBlock(Block):
    """BN-ReLU-conv1-BN-ReLU-conv3-BN-ReLU-conv1, shortcut: the unit of version 2.

    The net's first block begins with its convolution: BN-ReLU stand before it, after the stem. The
    stride is in the first 1x1.
    """

    expansion = 4
    weighted_layers = 3
    preactivation = True
    final_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        y = x if self.is_first else relu(self.norm(name="bn1")(x))
        y = self.conv(self.features, kernel=1, strides=self.strides, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.features, name="conv2")(y)
        y = relu(self.norm(name="bn3")(y))
        y = self.conv(self.out_features, kernel=1, name="conv3")(y)
        return self.join(x, y, survival)
