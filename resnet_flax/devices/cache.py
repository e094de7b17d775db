"""What is kept from one run to the next to start faster, in a directory of the user's.

All of it can be deleted at any time; nothing in it is needed, and what cannot be written there is
done without. `RESNET_FLAX_CACHE` names another directory; set but empty, it turns this off.
"""

import contextlib
import hashlib
import os
import pathlib
import platform

import jax

# Beyond this the oldest files go.
_MOST_BYTES = 2 * 10**9

# Programs that compile faster than this are not kept, seconds.
_WORTH_KEEPING = 0.3


def directory(name: str) -> pathlib.Path | None:
    """Makes the directory of that name, if need be; None where there can be none."""
    try:
        chosen = os.environ.get("RESNET_FLAX_CACHE")
        if chosen == "":
            return None
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        path = pathlib.Path(chosen or pathlib.Path(home) / "resnet_flax").expanduser() / name
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: of a ~ that leads nowhere.
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


def make_room(path: pathlib.Path, most: int = _MOST_BYTES) -> None:
    """Deletes files of a directory, oldest first, until it has at most so many bytes."""
    with contextlib.suppress(OSError):
        files = sorted(
            ((file.stat(), file) for file in path.iterdir() if file.is_file()),
            key=lambda pair: pair[0].st_mtime,
        )
        total = sum(stat.st_size for stat, _ in files)
        for stat, file in files:
            if total <= most:
                return
            file.unlink(missing_ok=True)
            total -= stat.st_size


def _processor() -> str:
    """A name for this kind of processor: a program compiled for it may not run on another."""
    kind = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += next(line for line in lines if line.startswith(("flags", "Features")))
    return hashlib.sha256(kind.encode()).hexdigest()[:16]


def keep_programs() -> None:
    """Lets jax keep what it compiles from one process to the next.

    Where JAX_COMPILATION_CACHE_DIR is set, whatever to, that is left to have its way. To be called
    by a process that runs alone: several must all compile, or all find, the same program.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    path = directory(f"programs-{_processor()}")
    if path is None:
        return
    make_room(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
