"""One process at a time, by a lock on a file."""

import fcntl
from typing import IO


def hold(file: IO, *, wait: bool = False) -> bool | None:
    """Locks a file until it is closed.

    Returns:
      True; False if another process holds the lock (with `wait` this waits for it instead); None if
      the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
