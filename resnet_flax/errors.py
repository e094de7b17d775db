"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in what was asked for, or a state of the machine that only the user can mend.

    The message is one or two lines: it names the thing, its value, and what to do. The entry points
    print it without a traceback and exit with a non-zero status.
    """
