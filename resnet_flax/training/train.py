"""A run from top to bottom. The loop itself is in `loop`."""

import contextlib
import pathlib
from typing import Any

from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import flatten, validate
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import distributed, hardware, randomness
from resnet_flax.errors import UserError
from resnet_flax.runs import environment
from resnet_flax.runs.directory import Directory
from resnet_flax.runs.progress import SEEDS, Progress
from resnet_flax.training import feed, seeds, setup, trained
from resnet_flax.training.loop import Loop
from resnet_flax.training.run import Run
from resnet_flax.training.setup import Setup
from resnet_flax.training.trained import Source


@randomness.default_switches()
def train(
    config: ConfigDict,
    directory: pathlib.Path,
    init_weights: str | None = None,
    checkpoint_dir: str | None = None,
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Trains a run, or resumes it, and leaves everything in `directory`.

    With `config.train.num_seeds` above 1: that many runs at once, in `directory/seed<k>`.

    A run starts from the newest undamaged checkpoint; without one from `init_weights`; else from
    the seed. Of several processes only the first reads and writes the directory and the weights
    file; each reads the data set.

    Args:
      config: see `config.base_config`.
      directory: of the run, or the parent of the runs of several seeds.
      init_weights: what to initialise a new run from: a weights file, the directory of a finished
        run, or the name of published weights.
      checkpoint_dir: where the checkpoints lie, a path or a URL that orbax can write to, of this
        run alone; None: in `directory`. A run whose directory was lost resumes from there.
      dataset: to train on; None: the one that `config.data` names.

    Returns:
      The content of `result.json`, or `{"stopped": step, "signal": name}` if SIGTERM or SIGINT
      ended the run early. Of several seeds `{"seeds": [result, …]}`. Only the first of several
      processes has a result, the others {}.

    Raises:
      UserError: anything the user can mend.
    """
    validate(config)
    config = config.copy_and_resolve_references()
    if checkpoint_dir is not None and config.train.num_seeds > 1:
        raise UserError(
            "--checkpoint_dir goes with one seed only, not with config.train.num_seeds="
            f"{config.train.num_seeds}"
        )
    initial = None
    if init_weights is not None and distributed.is_first():
        initial = trained.read_weights(init_weights)
    config.model.update(distributed.share(lambda: _known_model(config, initial, directory)))
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    runs = [Run(own, path, initial) for own, path in seeds.split(config, directory)]
    mesh = hardware.choose_mesh(config)
    here = environment.describe(mesh) | ({"seeds_in_program": len(runs)} if len(runs) > 1 else {})

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(distributed.index())))
        for run in runs if distributed.is_first() else ():
            run.directory = stack.enter_context(Directory.open(run.path))
            run.directory.check_config(flatten(run.config))
            run.directory.check_not_in_group()
        datasets = [dataset] if dataset else seeds.load_data([run.config for run in runs])
        for run, own in zip(runs, datasets, strict=True):
            run.dataset = own
            run.find_start(checkpoint_dir, progress.say)
            if run.result is not None:
                progress.say(f"the run in {run.path} is finished")
        put = feed.put_once()
        for run, own_mesh in zip(runs, seeds.meshes(mesh, len(runs)), strict=True):
            if run.result is None:
                with progress.waiting("preparing the data and the net"):
                    run.begin(own_mesh, put, here, progress)
        if unfinished := [run for run in runs if run.result is None]:
            progress.say(_describe(unfinished[0].setup, len(unfinished), here["hardware"]))
            if stopped := Loop(unfinished, progress).run():
                return stopped
    if not distributed.is_first():
        return {}
    return {SEEDS: [run.result for run in runs]} if len(runs) > 1 else runs[0].result


def _known_model(
    config: ConfigDict, initial: Source | None, directory: pathlib.Path
) -> dict[str, Any]:
    """The model's section, for "auto" with the net of the initial weights or of the run."""
    _, path = seeds.split(config, directory)[0]
    setup.take_model(config, initial.weights.model if initial else Directory(path).model)
    return config.model.to_dict()


def _describe(built: Setup, count: int, devices: str) -> str:
    """What is about to be trained, on what data and devices."""
    several = f"{count} seeds of " if count > 1 else ""
    how = "; convolutions written for a CPU" if built.model.cpu_convolutions else ""
    how += "; narrow convolutions by models/fused/" if built.model.uses_fused else ""
    images, batch = len(built.dataset.train), built.config.data.batch_size
    if batch > images:
        how += f"\nnote: a batch of {batch} holds images more than once, as there are {images}"
    return (
        f"{several}{built.config.model.name}, {built.count_parameters():,} parameters, on "
        f"{images:,} images of {built.dataset.name}; {devices}{how}"
    )
