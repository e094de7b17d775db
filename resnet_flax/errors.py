"""The exception that is meant for the user, and what its messages share."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that only the user can mend; the entry points print it without a traceback.

    The message is one or two lines: it names the thing, its value, and what to do.
    """


def first_line(error: BaseException, limit: int = 160) -> str:
    """The reason that an exception of a library gives, cut to `limit` characters."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.partition("\n")[0][:limit]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint (did you mean ...?) with a space before it; empty where no known name is close."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""
