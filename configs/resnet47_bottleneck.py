"""ResNet-47 with bottleneck blocks on CIFAR-10, the paper's recipe: 64k iterations of batch 128.

    python -m resnet_flax.main --config=configs/resnet47_bottleneck.py

The paper trains no such net on CIFAR-10: no error to compare with.
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's recipe for this net."""
    config = base_config()
    config.model.name = "resnet47_bottleneck"
    return config
