"""Evaluation of a run's checkpoint or of a weights file, as `--mode=evaluate` does it."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from resnet_flax import config as config_lib
from resnet_flax import models
from resnet_flax.config import base_config, flatten, validate
from resnet_flax.devices import distributed, hardware, randomness, sharding
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs import checkpoint, files, identity, record, weights
from resnet_flax.training import experiment, inputs
from resnet_flax.training.evaluate import Score
from resnet_flax.training.experiment import Experiment


@randomness.default_switches()
def score(
    config: ConfigDict | None,
    directory: str | None,
    source: str | None,
    warn: Callable[[str], None] = print,
    overrides: Mapping[str, str] | None = None,
) -> str:
    """Scores a net on every example of the test (and validation) split.

    Args:
      config: the configuration; None: the run's own, or for a weights file the base one with the
        file's net and data.
      directory: a run's. The scores are left there as `evaluation.json`.
      source: a weights file, a run's directory or one of its checkpoints; None: `directory`.
      warn: told of damaged checkpoints.
      overrides: changes, as text, of the configuration where that is None.

    Returns:
      Loss, error and per-class errors as text.

    Raises:
      UserError: anything the user can mend.
    """
    if config is not None and config.train.num_seeds > 1:
        raise UserError(
            f"--mode=evaluate scores one net, config.train.num_seeds={config.train.num_seeds}: "
            "leave that at 1, and choose the net with --config.seed or --workdir"
        )
    begin = functools.partial(_begin, config, directory, source, overrides or {})
    beginning = distributed.share(begin)
    config = fill(base_config(), json.loads(beginning["config"]))
    path = pathlib.Path(source or directory)
    mesh = hardware.choose_mesh(config)
    dataset = inputs.load_data(config)
    if beginning["is_file"]:
        weights.check_preprocessing(
            *beginning["preprocessing"], dataset.train.image_shape, str(path)
        )
    elif distributed.is_first():
        identity.check_same_data(_run_of(path), dataset)
    run = experiment.build(config, dataset, mesh, beginning["preprocessing"], warn)
    found = distributed.share(functools.partial(_read, path, run, warn))
    variables = sharding.put_tree(found["variables"], sharding.replicated(run.mesh))
    if not beginning["is_file"]:
        # A weights file holds what is to be scored; a checkpoint what was trained.
        variables = run.make_evaluated()(variables)
    scores, step = run.make_scorer()(variables), found["step"]
    if directory and distributed.is_first():
        content = {name: record.describe_score(s) for name, s in scores.items()}
        files.write_json(
            pathlib.Path(directory) / "evaluation.json",
            {"source": str(path), "step": step, **content, **record.environment(mesh)},
        )
    head = f"{run.config.model.name} from {path}" + (f", step {step}" if step is not None else "")
    tables = [_table(name, s, dataset.class_names) for name, s in scores.items()]
    return "\n".join([head, *tables])


def _begin(
    config: ConfigDict | None,
    directory: str | None,
    source: str | None,
    overrides: Mapping[str, str],
) -> dict[str, Any]:
    """What all processes need to know before they load anything."""
    if not (source or directory):
        raise UserError("nothing to evaluate: give --workdir, --weights or --config")
    path = pathlib.Path(source or directory)
    if not path.exists():
        raise UserError(f"{path} does not exist: give a weights file, or a run's directory")
    if directory:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    loaded = weights.load(path) if path.is_file() else None
    if config is None:
        config = own_config(path, loaded)
        config_lib.override(config, overrides)
    if not loaded:
        # What it was trained for, and on, is not the evaluation's to change.
        identity.check_same_config(_run_of(path), config, sections=("model", "data", "seed"))
    validate(config)
    identity.take_model(config, loaded, _run_of(path))
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    known = (loaded.mean, loaded.std) if loaded else identity.preprocessing(_run_of(path))
    return {
        "config": json.dumps(flatten(config)),
        "is_file": bool(loaded),
        "preprocessing": known and list(known),
    }


def _read(path: pathlib.Path, run: Experiment, warn) -> dict[str, Any]:
    """`variables` in the model's layout, on the host, and the `step` they are from, if known."""
    if path.is_file():
        loaded = weights.load(path)
        weights.check_model(loaded, record.describe_model(run), str(path))
        loaded = weights.for_classes(loaded, run.dataset.class_names, str(path))
        variables = weights.fit(loaded.variables, run.abstract_variables(), str(path))
        step = loaded.training.get("steps")
    else:
        step, variables = _from_checkpoint(path, run, warn)
    variables = layout.to_scanned(variables) if run.model.scan else variables
    return {"step": step, "variables": jax.device_get(variables)}


def _is_checkpoint(path: pathlib.Path) -> bool:
    return path.name.isdigit() and path.resolve().parent.name == "checkpoints"


def _run_of(path: pathlib.Path) -> pathlib.Path:
    """The run's directory, of it or of one of its checkpoints."""
    return path.resolve().parent.parent if _is_checkpoint(path) else path


def own_config(path: pathlib.Path, loaded: weights.Weights | None) -> ConfigDict:
    """The configuration that a run's directory, or the weights `loaded` from a file, tells of.

    Raises:
      UserError: the directory holds none.
    """
    config = base_config()
    elsewhere: tuple[str, ...] = ()
    if loaded:
        stored = loaded.training.get("config", {})
        stored = stored if isinstance(stored, dict) else {}
        stored |= {f"model.{key}": value for key, value in loaded.model.items()}
        # Where the data lay on the machine that made the file says nothing here.
        elsewhere = "data.data_dir", "data.archive", "data.mirror"
    else:
        stored = files.read_json(_run_of(path) / "config.json")
        if stored is None:
            raise UserError(f"{path} holds no config.json: give --config, or a run's directory")
    return fill(config, {k: v for k, v in stored.items() if k not in elsewhere})


def fill(config: ConfigDict, flat: dict[str, Any]) -> ConfigDict:
    """`config` with the values of a flat one, as JSON gives them; unknown keys are left out."""
    for key in flatten(config):
        if key in flat:
            value = flat[key]
            section, _, name = key.rpartition(".")
            target = config[section] if section else config
            with target.ignore_type():  # `validate` names what is wrong.
                target[name] = tuple(value) if isinstance(value, list) else value
    return config


def _from_checkpoint(path: pathlib.Path, run: Experiment, warn) -> tuple[int, Any]:
    if _is_checkpoint(path):
        step, (tree, _) = int(path.name), checkpoint.read(path)
    else:
        place = identity.checkpoint_directory(path, None)
        found = checkpoint.read_newest(place, warn, set_aside=False)
        if found is None:
            raise UserError(f"{path} holds no checkpoints")
        step, tree, _ = found
    # Averaged weights are what was evaluated, whatever this evaluation's configuration says.
    tree = tree["ema"] if "ema" in tree else {k: tree[k] for k in ("params", "batch_stats")}
    return step, weights.fit(tree, run.abstract_variables(), str(path))


def _table(split: str, score: Score, class_names: tuple[str, ...]) -> str:
    lines = [
        f"{split}: error {100 * score.error:.2f} % ({score.wrong} of {score.examples} wrong), "
        f"loss {score.loss:.4f}"
    ]
    if score.unreadable:
        lines[0] += f"; {score.unreadable} images could not be read"
    if len(score.confusion) >= record.MANY_CLASSES:
        return f"{lines[0]}, top-5 error {100 * score.top5_error:.2f} %"
    width = max(map(len, class_names))
    for name, error in zip(class_names, score.class_errors(), strict=False):
        lines.append(f"  {name:<{width}}  {100 * error:6.2f} %")
    return "\n".join(lines)
