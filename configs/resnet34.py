"""ResNet-34 on ImageNet, the paper's recipe: 600k iterations of batch 256.

    python -m resnet_flax.main --config=configs/resnet34.py --config.data.data_dir=DIR

The paper's top-1 validation error, %, averaged over ten crops: 24.52; with
`--config.model.shortcut=A` 25.03, with C 24.19.
Such crops: add `--mode=evaluate --config.eval.crops=10` afterwards. Not run here yet.
"""

from resnet_flax.config import imagenet_config


def get_config():
    """The paper's recipe for this net."""
    config = imagenet_config()
    config.model.name = "resnet34"
    return config
