"""What the tools' entry points share."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from resnet_flax.devices import cache
from resnet_flax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that raises `UserError` and accepts no abbreviated flags."""
    return _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an `OSError` inside into a `UserError`: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(arguments)`; a `UserError` becomes a line on stderr and exit status 1."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if sys.stdout is not None:
        # File names may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cache.keep_programs()
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # The reader has closed the pipe; without this Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        from resnet_flax.devices import hardware

        if reason := hardware.why_none():
            sys.exit(f"error: {reason}")
        raise
