"""From what a user names (published weights, a weights file, a run's directory) to a file."""

import os
import pathlib
from typing import Any

from resnet_flax import models
from resnet_flax.errors import UserError, did_you_mean
from resnet_flax.runs.files import read_json, sha256_of

FOLDER = pathlib.Path(__file__).parents[1] / "pretrained"
"""The published weights and their `index.json`, which `tools.publish` writes."""


def read_index() -> dict[str, dict[str, Any]]:
    """`file`, `sha256`, `model`, `test_error`, `results` and more of each published name."""
    return read_json(FOLDER / "index.json") or {}


def locate(source: str | os.PathLike) -> tuple[pathlib.Path, str]:
    """The weights file that a path, a run's directory or a published name stands for; its SHA-256.

    A file or directory of the user comes before published weights of the same name.

    Raises:
      UserError: there is none (the message lists the names), or the published file is damaged.
    """
    path, index = pathlib.Path(source).expanduser(), read_index()
    entry = None if path.exists() else index.get(str(source))
    if entry:
        path = FOLDER / entry["file"]
    elif path.is_dir():
        path = _file_of_run(path)
    if not path.is_file():
        raise UserError(
            f"weights file {path} of {source!r} is missing: install the package again"
            if entry
            else _no_such(str(source), index)
        )
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error.strerror}") from error
    if entry and digest != entry["sha256"]:
        raise UserError(
            f"weights file {path} is damaged: its SHA-256 is {digest[:12]}…, not "
            f"{entry['sha256'][:12]}… as published; install the package again"
        )
    return path, digest


def _file_of_run(directory: pathlib.Path) -> pathlib.Path:
    path = directory / "weights.safetensors"
    if not path.exists():
        seeds = sorted(str(p.parent) for p in directory.glob(f"seed*/{path.name}"))
        todo = f"name one of its runs, {', '.join(seeds)}" if seeds else "finish the run first"
        raise UserError(f"{directory} holds no weights.safetensors: {todo}")
    return path


def _no_such(source: str, index: dict[str, dict[str, Any]]) -> str:
    listed = [f"{n} ({100 * e['test_error']:.2f} % on {e['data']})" for n, e in index.items()]
    known = f"published: {', '.join(listed) or 'none'}"
    if os.sep in source or source.endswith(".safetensors"):
        return f"weights file {source} does not exist; {known}"
    if source in models.ARCHITECTURES:
        what = f"no weights are published for {source}"
    else:
        what = f"no published weights are called {source!r}{did_you_mean(source, index)}"
    return f"{what}; {known}; or give a weights file"
