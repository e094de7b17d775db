"""The user's cache directory, which makes the next run start faster; it may be deleted at any time.

RESNET_FLAX_CACHE names another directory; set but empty, it turns the cache off.
"""

import contextlib
import hashlib
import os
import pathlib
import platform

import jax

# Programs that compile faster than this, in seconds, are not kept.
_WORTH_KEEPING = 0.3


def directory(name: str) -> pathlib.Path | None:
    """A directory of the cache, made if need be; None where the cache is off or unwritable."""
    chosen = os.environ.get("RESNET_FLAX_CACHE")
    if chosen == "":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        path = pathlib.Path(chosen or f"{home}/resnet_flax").expanduser() / name
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a ~ that leads nowhere.
        return None
    return path if os.access(path, os.W_OK | os.X_OK) else None


def make_room(path: pathlib.Path, most: int = 2 * 10**9) -> None:
    """Deletes a directory's oldest files until at most `most` bytes are left."""
    with contextlib.suppress(OSError):
        files = [(file.stat(), file) for file in path.iterdir() if file.is_file()]
        total = sum(stat.st_size for stat, _ in files)
        for stat, file in sorted(files, key=lambda pair: pair[0].st_mtime):
            if total <= most:
                return
            file.unlink(missing_ok=True)
            total -= stat.st_size


def keep_programs() -> None:
    """Lets jax keep what it compiles, unless JAX_COMPILATION_CACHE_DIR is set.

    Only for a process that runs alone: several must all compile, or all find, the same program.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # A program compiled for one kind of processor may not run on another.
    kind = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind += next(line for line in lines if line.startswith(("flags", "Features")))
    path = directory(f"programs-{hashlib.sha256(kind.encode()).hexdigest()[:16]}")
    if path is None:
        return
    make_room(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
