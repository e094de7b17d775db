"""Training from arrays: `resnet_flax.fit`."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_flax.config import base_config, override
from resnet_flax.data import arrays
from resnet_flax.errors import UserError
from resnet_flax.pretrained import Pretrained, load_pretrained
from resnet_flax.training import loop
from resnet_flax.training.train import train

_NOT_FOR_ARRAYS = {"data.name", "eval.crops", "model.num_classes", "train.num_seeds"}


def fit(
    images,
    labels,
    *,
    test: arrays.Pair | None = None,
    class_names: Sequence[str] | None = None,
    model: str = "resnet20",
    workdir: str | os.PathLike = "runs/fit",
    total_steps: int = 64_000,
    weights: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Trains a net on images in memory, and returns it ready to use.

        net = resnet_flax.fit(images, labels, model="resnet20", total_steps=1000)
        net.predict(images[0])

    The recipe is the paper's [R §4.2]: batches of 128, a learning rate of 0.1 that is divided by
    ten at a half and at three quarters of the steps. What is left in `workdir` is a run like any
    other: the same call resumes it, or reads it if it has finished.

    Args:
      images: uint8 [N, S, S, 3], 0 to 255.
      labels: integers [N], from 0.
      test: images and labels to test on; None: a tenth of each class is held out.
      class_names: by label; None: the labels themselves.
      model: one of `models.ARCHITECTURES`.
      workdir: directory of the run.
      total_steps: batches to train on.
      weights: what to start from: a weights file, a finished run, or published weights.
      config: other keys of the configuration to change, `{"optim.learning_rate": 0.05}`.

    Raises:
      UserError: anything the user can mend.
      KeyboardInterrupt: a signal has stopped the run; it is saved.
    """
    for key in _NOT_FOR_ARRAYS & (config or {}).keys():
        raise UserError(f"config: {key} is not for `fit`, which trains one net on the given arrays")
    workdir = pathlib.Path(workdir).expanduser()
    c = base_config()
    c.model.name = model
    c.data.name = arrays.NAME
    c.train.total_steps = total_steps
    # Of very few steps both may be the same one.
    c.optim.boundaries_steps = tuple(sorted({max(total_steps * k // 4, 1) for k in (2, 3)}))
    c.eval.every_steps = c.checkpoint.every_steps = max(total_steps // 10, 1)
    c.log.every_steps = max(total_steps // 100, 1)
    override(c, {key: str(value) for key, value in (config or {}).items()})
    data = arrays.load((images, labels), test, class_names, split=c.data.split, seed=c.seed)
    # For `load_pretrained`: how large the images are that the net has seen.
    c.data.image_size = c.data.eval_short_side = data.train.image_shape[0]
    result = train(c, workdir, weights, dataset=data)
    if loop.STOPPED in result:
        step = result[loop.STOPPED]
        raise KeyboardInterrupt(f"stopped at step {step}; the same call resumes {workdir}")
    return load_pretrained(workdir)
