"""The plain net of 20 layers on CIFAR-10, the paper's recipe: 64k iterations of batch 128.

    python -m resnet_flax.main --config=configs/plain20.py

The paper's test error, %: 9.67 (read off its Fig. 6).
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's recipe for this net."""
    config = base_config()
    config.model.name = "plain20"
    return config
