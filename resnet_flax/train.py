"""A run: where it begins, and what it says at its end. The loop itself is in `loop`."""

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import (
    checkpoint,
    devices,
    distributed,
    experiment,
    identity,
    inputs,
    loop,
    models,
    record,
    sharding,
    weights,
    workdir,
)
from resnet_flax.data.dataset import Dataset
from resnet_flax.errors import UserError
from resnet_flax.experiment import Experiment
from resnet_flax.models import layout
from resnet_flax.progress import Progress
from resnet_flax.state import TrainState
from resnet_flax.validation import validate


def train(
    config: ConfigDict,
    directory: pathlib.Path,
    init_weights: str | None = None,
    checkpoint_dir: str | None = None,
) -> dict:
    """Trains, or goes on training, as configured; leaves everything in `directory`.

    Where it begins: at the newest undamaged checkpoint of the directory; else from `init_weights`;
    else from the seed. Of several processes only the first reads and writes the directory and the
    weights file; each reads the data set.

    Args:
      config: see `config.base_config`.
      directory: the run's own.
      init_weights: a weights file to initialise a new run from.
      checkpoint_dir: where the checkpoints are to lie, a path or a URL that orbax can write to, of
        this run alone; None: in `directory`. A run whose directory was lost goes on from there.

    Returns:
      What `result.json` holds, or `{"stopped": step}` when SIGTERM or SIGINT ended the run early.
      Of several processes only the first has a result.

    Raises:
      UserError: anything the user can mend.
    """
    validate(config)
    initial, digest = _load_initial(init_weights) if distributed.is_first() else (None, None)
    config = config.copy_and_resolve_references()
    config.model.update(distributed.share(lambda: _model_of(config, initial, directory)))
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    mesh = devices.choose_mesh(config)
    environment = record.environment(mesh)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(distributed.index())))
        if distributed.is_first():
            stack.enter_context(workdir.claim(directory))
            identity.check_same_config(directory, config)
        dataset = _load_data(config)
        preprocessing = distributed.share(
            lambda: _preprocessing(directory, dataset, initial, init_weights)
        )
        run = experiment.build(config, dataset, mesh, preprocessing, progress.warn)
        own = identity.describe(config, dataset)
        place = distributed.share(lambda: identity.checkpoint_directory(directory, checkpoint_dir))
        location = checkpoint.locate(place)
        begin = functools.partial(_begin, run, directory, place, own, digest, progress.say)
        beginning = distributed.share(begin)
        if beginning["result"] is not None:
            progress.say(f"the run in {directory} is finished")
            return json.loads(beginning["result"])
        state, history = _first_state(run, beginning, initial, init_weights)
        step = int(state.step)
        checkpoints = loop.Checkpoints(location, own, beginning["tree"] is not None)
        if distributed.is_first():
            if note := identity.other_devices(directory, mesh):
                progress.say(note)
            record.write_start(
                directory,
                config,
                run,
                step=step,
                environment=environment,
                init_weights=digest,
                checkpoint_dir=place,
            )
            progress.say(_describe(run, environment))
        return loop.Loop(run, directory, state, history, progress, environment, checkpoints).run()


def _describe(run: Experiment, environment: dict[str, Any]) -> str:
    """What is about to be trained, on what, where: a line."""
    pairs = "; narrow convolutions on pairs of pixels" if run.model.pair_pixels else ""
    return (
        f"{run.config.model.name}, {record.count_parameters(run):,} parameters, on "
        f"{len(run.dataset.train):,} images of {run.dataset.name}; {environment['hardware']}{pairs}"
    )


def _load_initial(path: str | None) -> tuple[weights.Weights | None, str | None]:
    """The weights to begin with, and the SHA-256 of their file."""
    if path is None:
        return None, None
    file = pathlib.Path(path).expanduser()
    loaded = weights.load(file)
    return loaded, hashlib.sha256(file.read_bytes()).hexdigest()


def _model_of(config: ConfigDict, initial, directory: pathlib.Path) -> dict[str, Any]:
    identity.take_model(config, initial, directory)
    return config.model.to_dict()


def _load_data(config: ConfigDict) -> Dataset:
    """The data set, the same on all processes; the first one prepares it where that is needed."""
    loaded = []
    distributed.share(lambda: loaded.append(inputs.load_data(config)))
    dataset = loaded[0] if loaded else inputs.load_data(config)
    for index, other in enumerate(distributed.gather(dataset.fingerprint)):
        if other != dataset.fingerprint:
            raise UserError(
                f"the data set {dataset.name} of process {index} is not that of process "
                f"{distributed.index()} (fingerprints {other[:12]}, {dataset.fingerprint[:12]}): "
                "give all machines the same"
            )
    return dataset


def _preprocessing(
    directory: pathlib.Path, dataset: Dataset, initial: weights.Weights | None, source: str | None
) -> list[np.ndarray] | None:
    """Mean and standard deviation, where they are not the data set's own."""
    identity.check_same_data(directory, dataset)
    known = identity.preprocessing(directory)
    if known is None and initial is not None:
        # A net knows what its images must look like; another mean would undo its training.
        known = initial.mean, initial.std
        weights.check_preprocessing(*known, dataset.train.image_shape, str(source))
    return known and list(known)


def _begin(
    run: Experiment,
    directory: pathlib.Path,
    place: str,
    own: dict[str, Any],
    digest: str | None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Where the run goes on: a checkpoint's `tree` and `history`; its `result` if it has ended."""
    found = checkpoint.read_newest(place, warn, set_aside=True)
    identity.check_same_beginning(directory, digest, resuming=found is not None)
    if found is None:
        return {"tree": None, "history": None, "result": None}
    step, tree, history = found
    identity.check_same_run(directory, place, history.get("run", own), own)
    total = run.config.train.total_steps
    result = record.finished(directory, total) if step == total else None
    return {"tree": tree, "history": history, "result": result and json.dumps(result)}


def _first_state(
    run: Experiment, beginning: dict[str, Any], initial: weights.Weights | None, source: str | None
) -> tuple[TrainState, loop.History]:
    tree, everywhere = beginning["tree"], sharding.replicated(run.mesh)
    if tree is not None:
        state = checkpoint.from_tree(tree, run.abstract_state(), run.model.scan)
        history = loop.History.from_record(beginning["history"])
        return sharding.put_tree(state, everywhere), history
    state = run.create_state()
    if source is None:
        return state, loop.History()
    head = jax.device_get(layout.to_canonical(state.params)["head"])
    variables = distributed.share(lambda: _fit_initial(run, initial, source, head))
    return run.create_state(variables), loop.History()


def _fit_initial(
    run: Experiment, initial: weights.Weights, source: str, head: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The weights' variables, with `head` for last layer where the classes are others."""
    model = record.describe_model(run)
    variables, template = initial.variables, run.abstract_variables()
    renamed = initial.class_names and initial.class_names != run.dataset.class_names
    if renamed or initial.model.get("num_classes") != model["num_classes"]:
        del model["num_classes"]
        variables = {**variables, "params": {**variables["params"], "head": head}}
    weights.check_model(initial, model, source)
    return weights.fit(variables, template, source)


def summary(result: dict[str, Any], directory: pathlib.Path) -> str:
    """What a finished run says last: what was learned, where it lies, what to run next.

    Raises:
      UserError: the result is not one of a finished run.
    """
    try:
        lines = [
            f"{result['model']} on {result['data']}: {100 * result['test_error_last']:.2f} % test "
            f"error ({result['test_wrong_last']} of {result['test_examples']} wrong) after "
            f"{result['steps']} steps in {result['seconds']:.0f} s.",
            f"Curves: {directory / 'curves.png'}  results: {directory / 'result.json'}  weights: "
            f"{directory / 'weights.safetensors'}",
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'result.json'} lacks {error}; delete it to redo") from error
    if result["data"] == "digits":
        learned = result["test_error_last"] < 0.1
        lines.append(
            ("It has learned to read handwritten digits. " if learned else "")
            + "Next, CIFAR-10 in ten epochs:\n"
            "  python -m resnet_flax.main --config=configs/cifar10_short.py"
        )
    return "\n".join(lines)
