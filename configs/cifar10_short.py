"""ResNet-20 on CIFAR-10 in 10 epochs, for a CPU.

    python -m resnet_flax.main --config=configs/cifar10_short.py

Half a cosine in place of the paper's steps, which need the length they were made for, and half the
paper's batch: in so few epochs the number of steps counts.
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's net, a sixteenth of its training."""
    config = base_config()
    config.model.name = "resnet20"
    config.data.batch_size = 64
    config.optim.schedule = "cosine"
    config.optim.warmup_rate = 0.01
    config.optim.warmup_steps = 200
    config.optim.warmup_linear = True
    config.optim.nesterov = True
    config.optim.weight_decay = 2.5e-4
    config.train.total_steps = 7820  # 10 epochs of 782 batches
    config.eval.every_steps = 782
    config.checkpoint.every_steps = 782
    config.log.every_steps = 46
    return config
