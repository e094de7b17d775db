"""ResNet-164 with pre-activation on CIFAR-10, the paper's recipe: 64k iterations of batch 128.

    python -m resnet_flax.main --config=configs/resnet164_preact.py

The paper's test error, %: 5.46 (arXiv:1603.05027, median of 5).
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's recipe for this net."""
    config = base_config()
    config.model.name = "resnet164_preact"
    # Identity Mappings warms up all its CIFAR nets at 0.01 for 400 iterations [I, Appendix].
    config.optim.warmup_rate = 0.01
    config.optim.warmup_steps = 400
    return config
