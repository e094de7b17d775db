"""Highway nets (arXiv:1505.00387) as deep and wide as the paper's plain nets, on CIFAR-10.

    python -m resnet_flax.main --config=configs/highway.py:highway32

The published Highway-19 (2.3M parameters) and Highway-32 (1.25M) have test errors of 7.54 (7.72 +-
0.16) and 8.80 % [R, Table 6]. They are other nets, trained another way, and so for orientation
only: resnet_flax/models/variants.py says how these differ, whose point is to compare them with
`plain32` and `resnet32` under one recipe. Compare `config.model.gate_bias` too: it is not tuned.
"""

from resnet_flax.config import base_config


def get_config(name="highway32"):
    """The recipe of [R] for the net called `name`, gates as arXiv:1505.00387 begins with them."""
    config = base_config()
    config.model.name = name
    config.model.gate_bias = -2.0  # that paper suggests -1 or -3, for example
    if name == "highway110":
        # As for the other nets of this depth.
        config.optim.warmup_rate = 0.01
        config.optim.warmup_steps = 400
    return config
