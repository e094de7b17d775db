"""Nets with stochastic depth on CIFAR-10 (Huang et al. 2016, arXiv:1603.09382).

    python -m resnet_flax.main --config=configs/stochastic_depth.py:resnet110

That paper's test errors, %, at the best validation step: 5.23 for resnet110 (6.41 with all blocks
always), 4.91 for resnet1202. Blocks that are dropped are computed all the same: they take no less
time here.
"""

from resnet_flax.config import base_config


def get_config(name="resnet110"):
    """500 epochs on 45,000 images, Nesterov momentum, rate / 10 at a half and three quarters."""
    config = base_config()
    config.model.name = name
    config.model.survival = 0.5
    config.data.split = "45k/5k"
    config.optim.nesterov = True
    config.optim.boundaries_steps = (87_891, 131_836)
    config.train.total_steps = 175_781
    config.eval.every_steps = 352  # an epoch
    if name == "resnet1202":
        # As the net without stochastic depth has it [R §4.2].
        config.optim.warmup_rate = 0.01
        config.optim.warmup_error = 0.8
    return config
