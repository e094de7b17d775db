"""A run's directory: one process at a time, one configuration for ever, whole files only."""

import contextlib
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from resnet_flax.errors import UserError

# End of the names of files that are not whole yet.
_PART = ".part"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader, or a crash, finds the old file or the new one, never a part."""
    write_atomically(path, (_pretty(value) + "\n").encode())


def _pretty(value: Any, margin: str = "") -> str:
    """JSON with an item a line, but lists of plain values on one: a matrix looks like one."""
    inner = margin + "  "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(k)}: {_pretty(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{margin}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list, tuple)) for v in value):
        return "[\n" + ",\n".join(inner + _pretty(v, inner) for v in value) + f"\n{margin}]"
    return json.dumps(value)


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file by way of a temporary one beside it, flushed to disk."""
    handle, name = tempfile.mkstemp(_PART, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file.

    Raises:
      UserError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object); restore it from a copy")
    return content


@contextlib.contextmanager
def claim(directory: pathlib.Path) -> Iterator[None]:
    """Makes the directory and holds it for this process; a failure leaves no empty one behind.

    Raises:
      UserError: it cannot be written, or another process holds it.
    """
    made = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "a")
    except OSError as error:
        raise UserError(
            f"cannot write in workdir {directory}: {error.strerror}; choose another --workdir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in workdir {directory}; wait for it, or choose "
                "another --workdir"
            ) from error
        except OSError:
            pass  # A file system without locks: two runs at once are the user's to avoid.
        for part in directory.glob(f".*{_PART}"):
            part.unlink()  # A kill left it.
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if made and [p.name for p in directory.iterdir()] == [".lock"]:
                    (directory / ".lock").unlink()
                    for path in made:
                        path.rmdir()
            raise


def differing_keys(old: dict[str, Any], new: dict[str, Any], ignored: frozenset[str]) -> list[str]:
    """Descriptions "key: old -> new" of flat configurations' differences."""
    as_json = json.loads(json.dumps(new, default=list))
    keys = sorted(set(old) | set(as_json))
    missing = object()
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {as_json.get(key, 'absent')!r}"
        for key in keys
        if key not in ignored and old.get(key, missing) != as_json.get(key, missing)
    ]
