"""Several processes as one run: they find each other, exchange small values, and end together.

JAX's own runtime is started last. Before it, every process reports to the first one on the
coordinator's port (`rollcall`), so that whatever is wrong (a process that is missing, two of the
same number) is said in a line. The connections stay open beside JAX's (`group`): on them go the
values that only the first process knows, a sign of life every few seconds, and the news that a
process has failed. JAX would notice a dead process too, but later, and abort without saying what to
do.

In a program of one process everything here does nothing.
"""

import time
from collections.abc import Callable
from typing import Any

import jax

from resnet_flax.devices.distributed.place import Place, find_place

__all__ = [
    "Place",
    "await_verdict",
    "count",
    "fail",
    "find_place",
    "finish",
    "gather",
    "index",
    "initialize",
    "is_first",
    "share",
]

_group: Any = None


def initialize(place: Place, *, connect_timeout: float, peer_timeout: float) -> None:
    """Joins the other processes; call it before anything touches jax's devices.

    Args:
      place: this process's.
      connect_timeout: seconds to wait for the others at the start.
      peer_timeout: seconds without a sign of life after which a process counts as lost.

    Raises:
      UserError: they did not all come, or two of them claim the same place.
    """
    global _group
    if place.count == 1:
        return
    # Imported here: they take a while, and most runs are of one process.
    from resnet_flax.devices.distributed.group import Group
    from resnet_flax.devices.distributed.rollcall import meet

    _group = Group(place.index, place.count, meet(place, connect_timeout), peer_timeout)
    # Signals are the loop's business; JAX would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(connect_timeout)),
        # For what the group does not see itself: it is quicker, and says more.
        heartbeat_timeout_seconds=60 + int(2 * peer_timeout),
        shutdown_timeout_seconds=60,
    )


def count() -> int:
    """Number of processes."""
    return _group.count if _group else 1


def index() -> int:
    """Number of this process, from 0."""
    return _group.index if _group else 0


def is_first() -> bool:
    """Whether this process is the one that reads, writes and speaks for all."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in their order, on all of them; all must call it.

    Args:
      value: of dicts with str keys, lists, str, bool, int, float, None and numpy arrays.
    """
    return _group.gather(value) if _group else [value]


def share(make: Callable[[], Any]) -> Any:
    """What `make()` returns on the first process, on all of them; it runs on that one only.

    The others wait as long as it takes. An exception in it ends all, by way of `fail`.

    Args:
      make: returns what `gather` can send.
    """
    return _group.share(make) if _group else make()


def fail(reason: str, status: int = 1) -> None:
    """Ends all processes, this one with `status`; returns where there is only one.

    The others print the reason and exit with status 1.
    """
    if _group:
        _group.end(f"process {_group.index} failed: {reason}", status)


def await_verdict(seconds: float = 5.0) -> None:
    """Gives the news of another process's end time to arrive; does not return if it does.

    A collective operation that fails does not know which process broke it off.
    """
    if _group:
        time.sleep(seconds)


def finish() -> None:
    """Leaves the others, in good order: returns when all are here."""
    global _group
    if _group:
        _group.finish()
        jax.distributed.shutdown()
        _group = None
