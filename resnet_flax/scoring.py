"""Evaluation of a run's checkpoint or of a weights file, as `--mode=evaluate` does it."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from resnet_flax import checkpoint, experiment, models, record, sharding, weights, workdir
from resnet_flax.config import base_config, flatten, validate
from resnet_flax.errors import UserError
from resnet_flax.evaluate import Score
from resnet_flax.experiment import Experiment
from resnet_flax.models import layout


def score(
    config: ConfigDict | None,
    directory: str | None,
    source: str | None,
    warn: Callable[[str], None] = print,
) -> str:
    """Scores a net on every example of the test (and validation) split.

    Args:
      config: the configuration; None: the run's own, or for a weights file the base one with the
        file's net and data.
      directory: a run's. The scores are left there as `evaluation.json`.
      source: a weights file, a run's directory or one of its checkpoints; None: `directory`.
      warn: told of damaged checkpoints.

    Returns:
      Loss, error and per-class errors as text.

    Raises:
      UserError: anything the user can mend.
    """
    path = pathlib.Path(source or directory or "").expanduser()
    if not (source or directory):
        raise UserError("nothing to evaluate: give --workdir, --weights or --config")
    if not path.exists():
        raise UserError(f"{path} does not exist: give a weights file, or a run's directory")
    loaded = weights.load(path) if path.is_file() else None
    config = config or _own_config(path, loaded)
    validate(config)
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    mesh = experiment.choose_mesh(config)
    dataset = experiment.load_data(config)
    run = experiment.build(config, dataset, mesh, loaded and (loaded.mean, loaded.std))
    if loaded:
        variables = weights.fit(loaded.variables, run.abstract_variables(), str(path))
        if run.model.scan:
            variables = layout.to_scanned(variables)
        step = loaded.training.get("steps")
    else:
        step, variables = _from_checkpoint(path, run, warn)
    variables = jax.device_put(variables, sharding.replicated(run.mesh))
    scores = run.make_scorer()(variables)
    if directory:
        content = {name: record.describe_score(s) for name, s in scores.items()}
        target = pathlib.Path(directory).expanduser()
        target.mkdir(parents=True, exist_ok=True)
        workdir.write_json(
            target / "evaluation.json",
            {"source": str(path), "step": step, **content, **record.environment(mesh)},
        )
    head = f"{run.config.model.name} from {path}" + (f", step {step}" if step is not None else "")
    tables = [_table(name, s, dataset.class_names) for name, s in scores.items()]
    return "\n".join([head, *tables])


def _own_config(path: pathlib.Path, loaded: weights.Weights | None) -> ConfigDict:
    config = base_config()
    if loaded:
        stored = loaded.training.get("config", {})
        stored |= {f"model.{key}": value for key, value in loaded.model.items()}
    else:
        run = path.parent.parent if path.name.isdigit() else path
        stored = workdir.read_json(run / "config.json")
        if stored is None:
            raise UserError(f"{run} holds no config.json: give --config, or a run's directory")
    for key in flatten(config):
        if key in stored and key not in ("data.data_dir", "data.archive", "data.mirror"):
            value = stored[key]
            section, _, name = key.rpartition(".")
            target = config[section] if section else config
            target[name] = tuple(value) if isinstance(value, list) else value
    return config


def _from_checkpoint(path: pathlib.Path, run: Experiment, warn) -> tuple[int, Any]:
    if path.name.isdigit():
        step, (tree, _) = int(path.name), checkpoint.read(path)
    else:
        found = checkpoint.read_newest(path / "checkpoints", warn, set_aside=False)
        if found is None:
            raise UserError(f"{path} holds no checkpoints")
        step, tree, _ = found
    state = checkpoint.from_tree(tree, run.abstract_state(), run.model.scan)
    return step, state.evaluated()


def _table(split: str, score: Score, class_names: tuple[str, ...]) -> str:
    lines = [
        f"{split}: error {100 * score.error:.2f} % ({score.wrong} of {score.examples} wrong), "
        f"loss {score.loss:.4f}"
    ]
    width = max(map(len, class_names))
    for name, error in zip(class_names, score.class_errors(), strict=False):
        lines.append(f"  {name:<{width}}  {100 * error:6.2f} %")
    return "\n".join(lines)
