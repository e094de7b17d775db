"""ResNet-20 on CIFAR-10 in 10 epochs, for a CPU.

    python -m resnet_flax.main --config=configs/cifar10_short.py

Half a cosine in place of the paper's steps, which need the length they were made for.
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's net and batch, a tenth of an ordinary run."""
    config = base_config()
    config.model.name = "resnet20"
    config.optim.schedule = "cosine"
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    config.train.total_steps = 3910  # 10 epochs of 391 batches
    config.eval.every_steps = 391
    config.checkpoint.every_steps = 391
    config.log.every_steps = 23
    return config
