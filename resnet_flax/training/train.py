"""A run from top to bottom. The loop itself is in `loop`."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import flatten, resolve_steps, validate
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import distributed, hardware, randomness
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs import checkpoint, environment, weights
from resnet_flax.runs.directory import Directory
from resnet_flax.runs.progress import SEEDS, Progress
from resnet_flax.training import feed, inputs, seeds, setup, trained
from resnet_flax.training.loop import Loop, Net
from resnet_flax.training.setup import Setup
from resnet_flax.training.trained import Source


@randomness.default_switches()
def train(
    config: ConfigDict,
    directory: pathlib.Path,
    init_weights: str | None = None,
    checkpoint_dir: str | None = None,
) -> dict:
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

    Returns:
      The content of `result.json`, or `{"stopped": step}` if SIGTERM or SIGINT ended the run early.
      Of several processes only the first has a result. Of several seeds `{"seeds": [result, …]}`.

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
    runs = [_Run(*pair) for pair in seeds.split(config, directory)]
    mesh = hardware.choose_mesh(config)
    here = environment.describe(mesh) | ({"seeds_in_program": len(runs)} if len(runs) > 1 else {})
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(distributed.index())))
        for run in runs if distributed.is_first() else ():
            run.directory = stack.enter_context(Directory.open(run.path))
            run.directory.check_config(flatten(run.config))
            run.directory.check_not_in_group()
        for run, dataset in zip(runs, _load_data([run.config for run in runs]), strict=True):
            run.dataset = dataset
        for run in runs:
            begin = functools.partial(_find_start, run, initial, checkpoint_dir, progress.say)
            run.start = distributed.share(begin)
            if run.start["result"] is not None:
                progress.say(f"the run in {run.path} is finished")
        setups = _build(runs, mesh, progress.warn)
        nets = [_make_net(run, built, initial, here, progress.say) for run, built in setups]
        results: Any = []
        if nets:
            progress.say(_describe(nets, here["hardware"]))
            results = Loop(nets, progress, here).run()
        if isinstance(results, dict):
            return results
        if not distributed.is_first():
            return {}
        new = iter(results)
        done = [json.loads(r.start["result"]) if r.start["result"] else next(new) for r in runs]
        return {SEEDS: done} if len(runs) > 1 else done[0]


@dataclasses.dataclass
class _Run:
    config: ConfigDict  # As given, of one seed.
    path: pathlib.Path
    directory: Directory | None = None  # Only on the first process.
    dataset: Dataset | None = None
    start: dict[str, Any] = dataclasses.field(default_factory=dict)  # See `_find_start`.

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the run, in case its directory is lost."""
        return {"config": flatten(self.config), "fingerprint": self.dataset.fingerprint}


def _known_model(config: ConfigDict, initial: Source | None, directory: pathlib.Path) -> dict:
    first = seeds.split(config, directory)[0][1]
    setup.take_model(config, initial.weights.model if initial else Directory(first).model)
    return config.model.to_dict()


def _load_data(configs) -> list[Dataset]:
    """The data sets, the same on all processes; the first one prepares them if need be."""
    loaded: list[list[Dataset]] = []
    distributed.share(lambda: loaded.append(seeds.load_data(configs)))
    datasets = loaded[0] if loaded else seeds.load_data(configs)
    here = datasets[0].fingerprint
    for index, other in enumerate(distributed.gather(here)):
        if other != here:
            raise UserError(
                f"the data set {datasets[0].name} of process {index} is not that of process "
                f"{distributed.index()} (fingerprints {other[:12]}, {here[:12]}): give all "
                "machines the same"
            )
    return datasets


def _find_start(
    run: _Run, initial: Source | None, checkpoint_dir: str | None, warn: Callable[[str], None]
) -> dict[str, Any]:
    """What a run starts from, as the first process finds it.

    Returns:
      `checkpoints`: where they lie; `preprocessing`: (mean, std), None for the data set's own;
      `tree` and `history` of the newest checkpoint, None without one; `result`: JSON, None if the
      run is not finished.
    """
    directory, dataset = run.directory, run.dataset
    directory.check_data(dataset.name, dataset.fingerprint)
    place = directory.checkpoints(checkpoint_dir)
    found = checkpoint.read_newest(checkpoint.locate(place), warn, set_aside=True)
    directory.check_initial_weights(initial and initial.sha256, resuming=found is not None)
    preprocessing = directory.preprocessing()
    if preprocessing is None and initial:
        # The weights were trained on images prepared like this.
        preprocessing = initial.weights.mean, initial.weights.std
        weights.check_preprocessing(*preprocessing, dataset.train.image_shape, str(initial.path))
    step, tree, history = found or (0, None, None)
    result = None
    if found is not None:
        directory.check_checkpoint(history.get("run", run.identity()), run.identity(), place)
        total = resolve_steps(run.config, len(dataset.train)).train.total_steps
        result = directory.finished(total) if step == total else None
    return {
        "checkpoints": place,
        "preprocessing": preprocessing and list(preprocessing),
        "step": step,
        "tree": tree,
        "history": history,
        "result": result and json.dumps(result),
    }


def _build(
    runs: list[_Run], mesh: Mesh, warn: Callable[[str], None]
) -> Iterator[tuple[_Run, Setup]]:
    """The setups of the runs that are not finished; several share images and statistics."""
    put, known = feed.put_once(), {}
    for run, own_mesh in zip(runs, seeds.meshes(mesh, len(runs)), strict=True):
        if run.start["result"] is not None:
            continue
        preprocessing = run.start["preprocessing"]
        if preprocessing is None:
            if id(run.dataset) not in known:
                kind = run.config.data.normalize
                known[id(run.dataset)] = inputs.statistics(run.dataset, kind)
            preprocessing = known[id(run.dataset)]
        yield run, setup.build(run.config, run.dataset, own_mesh, preprocessing, warn, put)


def _make_net(
    run: _Run,
    built: Setup,
    initial: Source | None,
    here: dict[str, Any],
    say: Callable[[str], None],
) -> Net:
    start = run.start
    if start["tree"] is not None:
        state = built.restore(start["tree"])
    else:
        state = built.create_state()
        if distributed.share(lambda: initial is not None):
            head = layout.to_canonical(jax.device_get(state.params))["head"]
            fit = functools.partial(_fit_initial, built, initial, head)
            state = built.create_state(distributed.share(fit))
    if run.directory is not None:
        _write_start(run, built, initial, here, say)
    checkpoints = checkpoint.locate(start["checkpoints"])
    return Net(built, run.path, state, checkpoints, run.identity(), start["history"])


def _fit_initial(built: Setup, initial: Source, head: Any) -> dict[str, Any]:
    """The weights' variables, with `head` for the last layer if the classes are others."""
    model, loaded, name = built.describe_model(), initial.weights, str(initial.path)
    variables = loaded.variables
    renamed = loaded.class_names and loaded.class_names != built.dataset.class_names
    if renamed or loaded.model.get("num_classes") != model["num_classes"]:
        del model["num_classes"]
        variables = {**variables, "params": {**variables["params"], "head": head}}
    weights.check_model(loaded, model, name)
    return weights.fit(variables, built.abstract_variables(), name)


def _write_start(
    run: _Run,
    built: Setup,
    initial: Source | None,
    here: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    directory, place = run.directory, run.start["checkpoints"]
    began_on = directory.record.get("devices", built.mesh.size)
    if began_on != built.mesh.size:
        say(
            f"note: the run began on {began_on} device(s) and goes on with {built.mesh.size}: the "
            "results agree up to rounding, not to the bit"
        )
    dataset, draw = built.dataset, built.dataset.validation_draw
    record = {
        "model": built.config.model.name,
        "shortcut": built.describe_model()["shortcut"],
        "devices": built.mesh.size,
        "init_weights": initial and initial.sha256,
        # Not if it is the usual place: directories are moved.
        "checkpoint_dir": None if place == str(run.path / "checkpoints") else place,
        "dtype": str(np.dtype(built.model.dtype)),
        "parameters": built.count_parameters(),
        "weighted_layers": models.get_architecture(built.config.model.name).weighted_layers,
        "total_steps": built.config.train.total_steps,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "train_examples": len(dataset.train),
            "validation_examples": len(dataset.validation or ()),
            "test_examples": len(dataset.test),
            "class_names": dataset.class_names,
            "validation_draw": list(map(int, draw)) if draw is not None else None,
        },
    }
    start = {"step": run.start["step"], **here}
    directory.write_start(flatten(run.config), record, (built.mean, built.std), start)


def _describe(nets: list[Net], hardware: str) -> str:
    """What is about to be trained, on what data and devices."""
    built = nets[0].setup
    several = f"{len(nets)} seeds of " if len(nets) > 1 else ""
    how = "; convolutions in the way of a CPU" if built.model.cpu_convolutions else ""
    how += "; narrow convolutions by models/fused/" if built.model.uses_fused else ""
    images, batch = len(built.dataset.train), built.config.data.batch_size
    if batch > images:
        how += f"\nnote: a batch of {batch} holds images more than once, as there are {images}"
    return (
        f"{several}{built.config.model.name}, {built.count_parameters():,} parameters, on "
        f"{images:,} images of {built.dataset.name}; {hardware}{how}"
    )
