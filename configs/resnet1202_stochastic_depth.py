"""ResNet-1202 with stochastic depth on CIFAR-10 (Huang et al. 2016, arXiv:1603.09382).

    python -m resnet_flax.main --config=configs/resnet1202_stochastic_depth.py

That paper's test error, %, at the best validation step: 4.91 (arXiv:1603.09382, abstract).
Blocks that are dropped are computed all the same: they take no less time here.
"""

from resnet_flax.config import base_config


def get_config():
    """500 epochs on 45,000 images, Nesterov momentum, rate / 10 at a half and three quarters."""
    config = base_config()
    config.model.name = "resnet1202"
    config.model.survival = 0.5
    config.data.split = "45k/5k"
    config.optim.nesterov = True
    config.optim.boundaries_steps = (87_891, 131_836)
    config.train.total_steps = 175_781
    config.eval.every_steps = 352  # an epoch
    # As the net without stochastic depth has it [R §4.2].
    config.optim.warmup_rate = 0.01
    config.optim.warmup_error = 0.8
    return config
