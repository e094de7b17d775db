"""The plain net of 110 layers on CIFAR-10, the paper's recipe: 64k iterations of batch 128.

    python -m resnet_flax.main --config=configs/plain110.py

The paper's test error, %: over 60 (read off its Fig. 6).
"""

from resnet_flax.config import base_config


def get_config():
    """The paper's recipe for this net."""
    config = base_config()
    config.model.name = "plain110"
    # By steps, not by error: it is not said that this net ever gets below 80 % at that rate.
    config.optim.warmup_rate = 0.01
    config.optim.warmup_steps = 400
    return config
