"""The paper's nets with what has been learned about training them since.

    python -m resnet_flax.main --config=configs/modern.py:resnet56

Half a cosine over 200 epochs, Nesterov momentum, five times the paper's weight decay (kernels
only), label smoothing, bfloat16 where there is an accelerator. The nets are exactly the paper's.
These values are a starting point: they have been neither tuned nor measured yet.
"""

from resnet_flax.config import base_config


def get_config(name="resnet20"):
    """The recipe for the net called `name`."""
    config = base_config()
    config.model.name = name
    config.data.batch_size = 128
    config.optim.schedule = "cosine"
    config.optim.warmup_rate = 0.0
    config.optim.warmup_steps = 391  # an epoch
    config.optim.warmup_linear = True
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    config.optim.decay_norm_and_bias = False
    config.optim.label_smoothing = 0.05
    config.train.total_steps = 78_125  # 200 epochs
    return config
