"""ResNet-20 on CIFAR-10, the paper's recipe: 64k iterations of batch 128.

    python -m resnet_flax.main --config=configs/resnet20.py

The paper's test error, %: 8.75.
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's recipe for this net."""
    config = base_config()
    config.model.name = "resnet20"
    return config
