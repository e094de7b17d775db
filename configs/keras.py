"""Keras's CIFAR-10 example, its nets with its recipe: Adam, 200 epochs of batch 32.

    python -m resnet_flax.main --config=configs/keras.py:resnet56_keras_v1

The test errors it reports, %, version 1: 7.84 (20), 7.54 (32), 7.50 (44), 7.29 (56), 7.35 (110);
version 2: 6.99 (56), 6.85 (110).
See models/variants.py for how its nets differ from the papers'. Not quite its recipe: it
draws shifts of fractions of a pixel, here they are of whole pixels; and it does not decay the dense
layer's kernel.
"""

from resnet_flax.config import base_config


def get_config(name="resnet20_keras_v1"):
    """The example's recipe for the net called `name`."""
    config = base_config()
    config.model.name = name
    config.model.bn_momentum = 0.99
    config.data.batch_size = 32
    config.data.normalize = "pixel_mean_255"
    config.data.pad = 3  # a tenth of 32 pixels
    config.data.fill = "edge"
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-3
    # "After epoch 80" counts epochs, of 1562.5 steps, from 0: 81 of them have the first rate.
    config.optim.boundaries_steps = (126_563, 189_063, 251_563, 282_813)
    config.optim.decay_factors = (1e-1, 1e-2, 1e-3, 0.5e-3)
    # Keras's l2(1e-4) adds 1e-4 * sum(w^2) to the loss, 2e-4 * w to the gradient.
    config.optim.weight_decay = 2e-4
    config.optim.decay_norm_and_bias = False
    config.train.total_steps = 312_500
    config.eval.every_steps = 3125  # two epochs
    return config
