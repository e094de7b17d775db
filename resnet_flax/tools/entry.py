"""What the tools' entry points share."""

import argparse
import os
import sys
from collections.abc import Callable

from resnet_flax.devices import cache
from resnet_flax.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser whose complaints are `UserError`s, without abbreviations of flags."""
    return _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(main: Callable[[list[str]], None]) -> None:
    """Runs `main(arguments)`; a `UserError` becomes a line on stderr and exit status 1."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if sys.stdout is not None:
        # Names of files may be of characters that the terminal's encoding lacks, or of none.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        cache.keep_programs()
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of a pipe has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        from resnet_flax.devices import hardware

        if not (reason := hardware.why_none()):
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(1)
