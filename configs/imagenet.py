"""The paper's nets on ImageNet, its recipe: 600k iterations of batch 256 [R §3.4].

    python -m resnet_flax.main --config=configs/imagenet.py:resnet50 --config.data.data_dir=DIR

The paper's top-1 validation errors, %, averaged over ten crops: plain18 27.94, plain34 28.54;
resnet18 27.88 with `--config.model.shortcut=A`; resnet34 24.52, with A 25.03, with C 24.19;
resnet50 22.85, resnet101 21.75, resnet152 21.43. For such crops add
`--mode=evaluate --config.eval.crops=10` afterwards. Not run here yet.
"""

from resnet_flax.config import base_config


def get_config(name="resnet50"):
    """The paper's recipe for the net called `name`."""
    config = base_config()
    config.model.name = name
    config.data.name = "imagenet2012"
    config.data.batch_size = 256
    config.data.pad = 0
    config.data.color = True
    # The paper divides the rate by 10 "when the error plateaus"; here, every 30 epochs.
    config.optim.boundaries_steps = (150_000, 300_000, 450_000)
    config.train.total_steps = 600_000
    config.eval.every_steps = 5_000
    config.eval.batch_size = 256
    config.checkpoint.every_steps = 5_000
    return config
