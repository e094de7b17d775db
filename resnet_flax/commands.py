"""The commands of this package, its modules that `python -m` runs, and their configurations."""

import ast
import pathlib

from resnet_flax import signals

_FOLDER = pathlib.Path(__file__).resolve().parent


def _is_command(source: str) -> bool:
    return '\nif __name__ == "__main__":\n' in source


def find() -> dict[str, str]:
    """The first line of each command's docstring, by its module's name."""
    found = {}
    for path in sorted(_FOLDER.rglob("*.py")):
        if _is_command(source := path.read_text()):
            name = ".".join(path.relative_to(_FOLDER.parent).with_suffix("").parts)
            purpose, *_ = ast.get_docstring(ast.parse(source)).splitlines()
            found[name.removesuffix(".__main__")] = purpose
    return found


def configs() -> pathlib.Path:
    """The folder of the project's configurations: in an installed package, or a checkout's."""
    installed = _FOLDER / "configs"
    return installed if installed.is_dir() else _FOLDER.parent / "configs"


def begin(arguments: list[str]) -> None:
    """Refuses modules that are no commands; `arguments` are `sys.orig_argv`."""
    signals.end_on_interrupt()
    name = arguments[arguments.index("-m") + 1]
    path = (_FOLDER.parent / name.replace(".", "/")).with_suffix(".py")
    if path.is_file() and not _is_command(path.read_text()):
        raise SystemExit(f"error: {name} is no command; python -m {__package__} lists them")
