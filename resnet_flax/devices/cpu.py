"""What makes training on a CPU fast; measured in results/performance.md."""

import contextlib
import ctypes
import os
import pathlib
import platform
import sys
from typing import Any

import jax


def choose_devices(batch_size: int, bn_group_size: int, *, cores: int, processes: int = 1) -> int:
    """How many devices a process splits its CPU into: XLA runs many operations on one core only.

    The most, up to one per core, that divide the batch of all processes (and its batch-norm groups;
    size 0: one) evenly and leave each device at least 16 examples.
    """
    units = batch_size // (bn_group_size or 1)
    # With fewer examples on a device, dispatch costs more than the core gains.
    most = min(cores, batch_size // 16 // processes)
    return max((n for n in range(1, most + 1) if units % (n * processes) == 0), default=1)


def describe_cores() -> dict[str, Any]:
    """This machine's identity, and the numbers of the cores this process may use."""
    machine, cores = platform.node(), range(os.cpu_count() or 1)
    with contextlib.suppress(OSError):  # Each container has a node's name of its own.
        machine = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(AttributeError):  # Not on every system.
        cores = os.sched_getaffinity(0)
    return {"machine": machine, "cores": sorted(cores)}


def cores_per_process(described: list[dict[str, Any]]) -> int:
    """The number of cores that every process can have, from `describe_cores` of each."""
    machines: dict[str, list[list[int]]] = {}
    for one in described:
        machines.setdefault(one["machine"], []).append(one["cores"])
    shares = [len(set().union(*each)) // len(each) for each in machines.values()]
    return max(1, min(shares))


def choose_workers(requested: int, cores: int) -> int:
    """How many processes decode images; -1: one per core, 16 at most."""
    # 16 decode more than today's accelerators take from one machine.
    return min(cores, 16) if requested < 0 else requested


def keep_freed_memory(keep: bool = True) -> None:
    """Tells glibc to keep what XLA frees, or no longer to.

    Otherwise each step maps its activations anew and clears their pages. Does nothing under another
    C library, or where the environment has MALLOC_ settings.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # Parameters of mallopt(3).
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0 if keep else 65536)
        mallopt(trim_threshold, -1 if keep else 128 * 1024)
        mallopt(arena_max, 1)


def limit_kept_memory(compiled: jax.stages.Compiled) -> None:
    """Undoes `keep_freed_memory` where memory is short: six times what a step needs may be kept.

    A freed block is of no use to the next step once something small lies in it.
    """
    if jax.default_backend() == "cpu":
        step_bytes = compiled.memory_analysis().temp_size_in_bytes * jax.local_device_count()
        if 6 * step_bytes > memory_bytes():
            keep_freed_memory(False)


def memory_bytes() -> int:
    """This machine's memory, or a container's limit; `sys.maxsize` if unknown."""
    found = [sys.maxsize]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Not every system has these.
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # No such file; "max".
            found.append(int(pathlib.Path("/sys/fs/cgroup", name).read_text()))
    return min(found)
