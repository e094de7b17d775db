"""A list of a directory's files with the SHA-256 of each, kept in it as `files.json`."""

import hashlib
import json

from etils import epath

_NAME = "files.json"


def _list(path: epath.Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by its relative path."""
    found = {}
    for child in sorted(path.iterdir()):
        if child.is_dir():
            found |= {f"{child.name}/{k}": v for k, v in _list(child).items()}
        elif child.name != _NAME:
            found[child.name] = hashlib.sha256(child.read_bytes()).hexdigest()
    return found


def write(path: epath.Path) -> None:
    """Lists the files below a directory, once all are there."""
    temporary = path / f"{_NAME}.tmp"
    temporary.write_text(json.dumps(_list(path)))
    temporary.replace(path / _NAME)


def find_damage(path: epath.Path) -> str | None:
    """What is wrong with the files, where there is a list to compare them with; else None.

    Orbax would find most of it too, but in pages of tracebacks from threads of its own.
    """
    try:
        expected = json.loads((path / _NAME).read_text())
        actual = _list(path)
        for name, digest in expected.items():
            if name not in actual:
                return f"file {name} is missing"
            if actual[name] != digest:
                return f"file {name} has changed"
    except FileNotFoundError:
        return None  # Killed between saving and listing: the content's own hash decides.
    except (ValueError, AttributeError, OSError) as error:
        return f"file {_NAME} cannot be read: {error}"
    return None
