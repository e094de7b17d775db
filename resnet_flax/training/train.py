"""A run: where it begins, and what it says at its end. The loop itself is in `loop`."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax import models, pretrained
from resnet_flax.config import validate
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import distributed, hardware, randomness
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs import checkpoint, files, identity, record, weights
from resnet_flax.runs.progress import SEEDS, Progress
from resnet_flax.training import experiment, handover, inputs, loop, seeds
from resnet_flax.training.account import Account, History
from resnet_flax.training.experiment import Experiment
from resnet_flax.training.state import TrainState


@randomness.default_switches()
def train(
    config: ConfigDict,
    directory: pathlib.Path,
    init_weights: str | None = None,
    checkpoint_dir: str | None = None,
) -> dict:
    """Trains, or goes on training, as configured; leaves everything in `directory`.

    With `config.train.num_seeds` above 1: so many runs at once, in `directory/seed<k>`, see
    `handover`.

    Where it begins: at the newest undamaged checkpoint of the directory; else from `init_weights`;
    else from the seed. Of several processes only the first reads and writes the directory and the
    weights file; each reads the data set.

    Args:
      config: see `config.base_config`.
      directory: the run's own, or that of the runs of several seeds.
      init_weights: what to initialise a new run from: a weights file, the directory of a finished
        run, or the name of published weights.
      checkpoint_dir: where the checkpoints are to lie, a path or a URL that orbax can write to, of
        this run alone; None: in `directory`. A run whose directory was lost goes on from there.

    Returns:
      What `result.json` holds, or `{"stopped": step}` when SIGTERM or SIGINT ended the run early.
      Of several processes only the first has a result. Of several seeds `{"seeds": [result, …]}`.

    Raises:
      UserError: anything the user can mend.
    """
    validate(config)
    initial, digest = _load_initial(init_weights) if distributed.is_first() else (None, None)
    config = config.copy_and_resolve_references()
    directories, group = _directories(config, directory, checkpoint_dir)
    config.model.update(distributed.share(lambda: _model_of(config, initial, directories[0])))
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    configs = seeds.member_configs(config)
    mesh = hardware.choose_mesh(config)
    environment = record.environment(mesh) | ({"seeds_in_program": len(configs)} if group else {})
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(contextlib.closing(Progress(distributed.index())))
        if distributed.is_first():
            for own, one in zip(directories, configs, strict=True):
                stack.enter_context(files.claim(own))
                identity.check_same_config(own, one)
                if not group:
                    identity.check_same_group(own, None)
        datasets = seeds.load_data(configs) if group else [_load_data(config)]
        preprocessing = [
            distributed.share(functools.partial(_preprocessing, *pair, initial, init_weights))
            for pair in zip(directories, datasets, strict=True)
        ]
        if group:
            run = seeds.build(configs, datasets, mesh, preprocessing, progress.warn)
        else:
            run = experiment.build(config, datasets[0], mesh, preprocessing[0], progress.warn)
        identities = [identity.describe(c, d) for c, d in zip(configs, datasets, strict=True)]
        if group:
            place = str(handover.place_of(directories))
            total = run.config.train.total_steps
            beginnings = handover.begin(directories, identities, digest, total, progress.say)
        else:
            place = distributed.share(
                lambda: identity.checkpoint_directory(directory, checkpoint_dir)
            )
            checkpoint.locate(place)
            begin = functools.partial(
                _begin, run, directory, place, identities[0], digest, progress.say
            )
            beginnings = [distributed.share(begin)]
        if all(beginning["result"] is not None for beginning in beginnings):
            for own in directories:
                progress.say(f"the run in {own} is finished")
            results = [json.loads(beginning["result"]) for beginning in beginnings]
            return {SEEDS: results} if group else results[0]
        state = _first_state(run, [b["tree"] for b in beginnings], initial, init_weights)
        step = loop.step_of(state)
        accounts = [
            Account(member, own, History.from_record(beginning["history"] or {}), about)
            for member, own, beginning, about in zip(
                run.members, directories, beginnings, identities, strict=True
            )
        ]
        if distributed.is_first():
            if note := identity.other_devices(directories[0], mesh):
                progress.say(note)
            for own, one, member in zip(directories, configs, run.members, strict=True):
                record.write_start(
                    own,
                    one,
                    member,
                    step=step,
                    environment=environment,
                    init_weights=digest,
                    checkpoint_dir=str(own / "checkpoints") if group else place,
                    group=group,
                )
            progress.say(_describe(run, environment))
        checkpoints = loop.Checkpoints(
            checkpoint.locate(place),
            beginnings[0]["tree"] is not None,
            functools.partial(handover.hand_out, directories) if group else lambda accounts: None,
        )
        results = loop.Loop(run, accounts, state, progress, environment, checkpoints).run()
        if isinstance(results, dict):
            return results
        if group:
            handover.clear(directories)
            return {SEEDS: results}
        return results[0] if results else {}


def _directories(
    config: ConfigDict, directory: pathlib.Path, checkpoint_dir: str | None
) -> tuple[list[pathlib.Path], str | None]:
    """Those of the runs, and what those of several seeds are called together."""
    count = config.train.num_seeds
    if count == 1:
        return [directory], None
    if checkpoint_dir is not None:
        raise UserError(
            f"--checkpoint_dir goes with one seed only, not with config.train.num_seeds={count}"
        )
    directories = [directory / f"seed{config.seed + i}" for i in range(count)]
    return directories, handover.group_of(directories)


def _describe(run: Experiment | seeds.Group, environment: dict[str, Any]) -> str:
    """What is about to be trained, on what, where."""
    several = f"{len(run.members)} seeds of " if len(run.members) > 1 else ""
    how = "; convolutions in the way of a CPU" if run.model.cpu_convolutions else ""
    how += "; narrow convolutions by models/kernels/" if run.model.uses_kernels else ""
    images, batch = len(run.dataset.train), run.config.data.batch_size
    if batch > images:
        how += f"\nnote: a batch of {batch} holds images more than once, as there are {images}"
    return (
        f"{several}{run.config.model.name}, {record.count_parameters(run.members[0]):,} "
        f"parameters, on {images:,} images of {run.dataset.name}; "
        f"{environment['hardware']}{how}"
    )


def _load_initial(path: str | None) -> tuple[weights.Weights | None, str | None]:
    """The weights to begin with, and the SHA-256 of their file."""
    if path is None:
        return None, None
    file, digest = pretrained.locate(path)
    return weights.load(file), digest


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
    run: Experiment | seeds.Group,
    trees: list[dict[str, Any] | None],
    initial: weights.Weights | None,
    source: str | None,
) -> TrainState:
    first = run.members[0]
    if trees[0] is not None:
        template = first.abstract_state()
        return run.place([checkpoint.from_tree(t, template, run.model.scan) for t in trees])
    state = run.create_state()
    if source is None:
        return state
    heads = [layout.to_canonical(s.params)["head"] for s in run.host_states(state)]
    variables = distributed.share(
        lambda: [_fit_initial(first, initial, source, head) for head in heads]
    )
    return run.create_state(variables if len(run.members) > 1 else variables[0])


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
