"""ResNet-20 learns to read scikit-learn's handwritten digits: no download, about a minute on a CPU.

python -m resnet_flax.main --config=configs/quickstart.py
"""

from resnet_flax.config import base_config


def get_config():
    """The base configuration, shortened and without mirror images (a mirrored 2 is not a 2)."""
    config = base_config()
    config.data.name = "digits"
    config.data.batch_size = 64
    config.data.flip = False
    config.data.pad = 2
    config.optim.schedule = "cosine"
    config.train.total_steps = 220
    config.eval.every_steps = 44
    config.eval.batch_size = 360
    config.checkpoint.every_steps = 44
    config.log.every_steps = 11
    return config
