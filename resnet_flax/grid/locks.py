"""Who works on what, where several processes share a directory.

Locks are the operating system's (flock): they end with the process that holds them, however it
ends. A file system shared by several machines has to support them, as NFS and Lustre (mounted with
`flock`) do; buckets mounted as directories do not.
"""

import fcntl
import pathlib
from typing import IO

from resnet_flax.errors import UserError


def _open(path: pathlib.Path) -> IO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose another --workdir"
        ) from error


def hold(path: pathlib.Path) -> IO | None:
    """A lock on the file `path`, held until it is closed; None while another holds it.

    Where the file system knows no locks everyone gets one, see `are_supported`.

    Raises:
      UserError: the file cannot be written.
    """
    file = _open(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass
    return file


def is_held(path: pathlib.Path) -> bool:
    """Whether another process holds the lock on a file, which need not be there."""
    if not path.exists():
        return False
    lock = hold(path)
    if lock is not None:
        lock.close()
    return lock is None


def are_supported(directory: pathlib.Path) -> bool:
    """Whether the file system of `directory`, which is made, knows locks."""
    path = directory / ".locks" / "test"
    with _open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError:
            return False
    return True
