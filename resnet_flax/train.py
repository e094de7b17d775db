"""A run: where it begins, and what it says at its end. The loop itself is in `loop`."""

import contextlib
import hashlib
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from resnet_flax import (
    checkpoint,
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
from resnet_flax.errors import UserError
from resnet_flax.experiment import Experiment
from resnet_flax.models import layout
from resnet_flax.progress import Progress
from resnet_flax.state import TrainState
from resnet_flax.validation import validate


def train(config: ConfigDict, directory: pathlib.Path, init_weights: str | None = None) -> dict:
    """Trains, or goes on training, as configured; leaves everything in `directory`.

    Where it begins: at the newest undamaged checkpoint of the directory; else from `init_weights`;
    else from the seed.

    Args:
      config: see `config.base_config`.
      directory: the run's own.
      init_weights: a weights file to initialise a new run from.

    Returns:
      What `result.json` holds, or `{"stopped": step}` when SIGTERM or SIGINT ended the run early.

    Raises:
      UserError: anything the user can mend.
    """
    validate(config)
    initial, digest = _load_initial(init_weights)
    config = config.copy_and_resolve_references()
    identity.take_model(config, initial, directory)
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    mesh = experiment.choose_mesh(config)
    environment = record.environment(mesh)
    with workdir.claim(directory), contextlib.closing(Progress()) as progress:
        identity.check_same_config(directory, config)
        dataset = inputs.load_data(config)
        identity.check_same_data(directory, dataset)
        preprocessing = identity.preprocessing(directory)
        if preprocessing is None and initial is not None:
            # A net knows what its images must look like; another mean would undo its training.
            preprocessing = initial.mean, initial.std
            shape = dataset.train.image_shape
            weights.check_preprocessing(*preprocessing, shape, str(init_weights))
        run = experiment.build(config, dataset, mesh, preprocessing, progress.say)
        found = checkpoint.read_newest(directory / "checkpoints", progress.say, set_aside=True)
        identity.check_same_beginning(directory, digest, resuming=found is not None)
        total = run.config.train.total_steps
        if found and found[0] == total and (result := record.finished(directory, total)):
            progress.say(f"the run in {directory} is finished")
            return result
        state, history = _first_state(run, found, initial, init_weights)
        if note := identity.other_devices(directory, mesh):
            progress.say(note)
        record.write_start(
            directory,
            config,
            run,
            step=int(state.step),
            environment=environment,
            init_weights=digest,
        )
        saved = directory / "checkpoints" / str(found[0]) if found else None
        return loop.Loop(run, directory, state, history, progress, environment, saved).run()


def _load_initial(path: str | None) -> tuple[weights.Weights | None, str | None]:
    """The weights to begin with, and the SHA-256 of their file."""
    if path is None:
        return None, None
    file = pathlib.Path(path).expanduser()
    loaded = weights.load(file)
    return loaded, hashlib.sha256(file.read_bytes()).hexdigest()


def _first_state(
    run: Experiment, found, initial: weights.Weights | None, source: str | None
) -> tuple[TrainState, loop.History]:
    if found is not None:
        _, tree, saved = found
        state = checkpoint.from_tree(tree, run.abstract_state(), run.model.scan)
        state = jax.device_put(state, sharding.replicated(run.mesh))
        # A copy: device_put may alias the host array, and donation would then free it twice.
        return jax.tree.map(lambda x: x.copy(), state), loop.History.from_record(saved)
    if initial is None:
        return run.create_state(), loop.History()
    return run.create_state(_fit_initial(run, initial, source)), loop.History()


def _fit_initial(run: Experiment, initial: weights.Weights, source: str) -> dict[str, Any]:
    """The weights' variables, with a new last layer where the classes are others."""
    model = record.describe_model(run)
    variables, template = initial.variables, run.abstract_variables()
    renamed = initial.class_names and initial.class_names != run.dataset.class_names
    if renamed or initial.model.get("num_classes") != model["num_classes"]:
        del model["num_classes"]
        fresh = layout.to_canonical(run.create_state().params)["head"]
        params = {**variables["params"], "head": jax.device_get(fresh)}
        variables = {**variables, "params": params}
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
