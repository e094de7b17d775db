"""A net trained before, on a folder of your own images: its last layer is new, the rest goes on.

    python -m resnet_flax.main --config=configs/finetune_folder.py \
        --config.data.data_dir=photos --weights=resnet20

`photos` has a folder for each class (photos/cats/1.jpg); a tenth of each class is the test set,
unless there are photos/train and photos/test, with the classes in them. Net, size of the images and
preprocessing are those of the weights.
"""

from resnet_flax.config import base_config


def get_config():
    """Fine-tuning: a small rate, falling to nothing in a thousand steps."""
    config = base_config()
    config.model.name = "auto"
    config.data.name = "folder"
    config.data.batch_size = 64
    config.data.pad = -1
    config.optim.learning_rate = 0.01
    config.optim.schedule = "cosine"
    config.optim.nesterov = True
    config.train.total_steps = 1000
    config.eval.every_steps = 250
    config.eval.batch_size = 256
    config.checkpoint.every_steps = 250
    config.log.every_steps = 50
    return config
