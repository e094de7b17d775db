"""The paper's nets on CIFAR-10, its recipe: 64k iterations of batch 128 [R §4.2].

    python -m resnet_flax.main --config=configs/paper.py:plain56

The paper's test errors, %, of 20, 32, 44, 56 and 110 layers: plain 9.67, 10.1, 11.3, 13.3 and over
60 (read off its Fig. 6); residual 8.75, 7.51, 7.17, 6.97 and 6.43 (best of 5; 6.61 +- 0.16). The
residual nets have files of their own, too: configs/resnet20.py. The paper does not train
resnet47_bottleneck on CIFAR-10.
"""

from resnet_flax.config import base_config


def get_config(name="plain20"):
    """The paper's recipe for the net called `name`."""
    config = base_config()
    config.model.name = name
    if name in ("resnet110", "resnet1202"):
        # "We use 0.01 to warm up the training until the training error is below 80%" [R §4.2].
        config.optim.warmup_rate = 0.01
        config.optim.warmup_error = 0.8
    if name == "plain110":
        # By steps, not by error: it is not said that this net ever gets below 80 % at that rate.
        config.optim.warmup_rate = 0.01
        config.optim.warmup_steps = 400
    return config
