"""Files that are whole or not there: written beside, flushed, then renamed."""

import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_flax.errors import UserError

# Suffix of the temporary files.
PART = ".part"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file: a reader, or a crash, finds the old content or the new one."""
    write_atomically(path, (_pretty(value) + "\n").encode())


def _pretty(value: Any, margin: str = "") -> str:
    """JSON with one item per line, but lists of plain values on one: a matrix looks like one."""
    inner = margin + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(k)}: {_pretty(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{margin}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list, tuple)) for v in value):
        return "[\n" + ",\n".join(inner + _pretty(v, inner) for v in value) + f"\n{margin}]"
    return json.dumps(value)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file through a temporary one beside it, flushed to disk."""
    # Two processes, on two machines perhaps, may write the same file of a shared cache.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file.

    Raises:
      UserError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object); restore it from a copy")
    return content


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(arrays: Mapping[str, np.ndarray], description: dict[str, Any]) -> str:
    """SHA-256, in hex, of every array's name, dtype, shape and bytes, and of JSON about them."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
