"""The nets of Identity Mappings (arXiv:1603.05027, Tables 1 to 3) on CIFAR-10.

    python -m resnet_flax.main --config=configs/identity_mappings.py:resnet164_preact
    python -m resnet_flax.main --config=configs/identity_mappings.py:resnet110_shortcut_gating \
        --config.model.gate_bias=0

The paper's test errors, %, median of 5, with pre-activation: resnet110_preact 6.37,
resnet164_preact 5.46. resnet_flax/models/variants.py has those of ResNet-110 with other shortcuts
or another order of its layers.
"""

from resnet_flax.config import base_config


def get_config(name="resnet110_preact"):
    """The paper's recipe for the net called `name`."""
    config = base_config()
    config.model.name = name
    # Identity Mappings warms up all its CIFAR nets at 0.01 for 400 iterations [I, Appendix].
    config.optim.warmup_rate = 0.01
    config.optim.warmup_steps = 400
    return config
