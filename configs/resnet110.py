"""ResNet-110 on CIFAR-10, the paper's recipe: 64k iterations of batch 128.

    python -m resnet_flax.main --config=configs/resnet110.py

The paper's test error, %: 6.43 (best of 5; 6.61 +- 0.16).
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's recipe for this net."""
    config = base_config()
    config.model.name = "resnet110"
    # "We use 0.01 to warm up the training until the training error is below 80%" [R §4.2].
    config.optim.warmup_rate = 0.01
    config.optim.warmup_error = 0.8
    return config
