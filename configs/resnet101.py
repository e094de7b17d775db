"""ResNet-101 on ImageNet, the paper's recipe: 600k iterations of batch 256.

    python -m resnet_flax.main --config=configs/resnet101.py --config.data.data_dir=DIR

The paper's top-1 validation error, %, averaged over ten crops: 21.75.
Such crops: add `--mode=evaluate --config.eval.crops=10` afterwards. Not run here yet.
"""

from resnet_flax.config import imagenet_config


def get_config():
    """The paper's recipe for this net."""
    config = imagenet_config()
    config.model.name = "resnet101"
    return config
