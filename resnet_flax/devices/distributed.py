"""Several processes as one run: they find each other, exchange small values, and end together.

JAX's runtime carries the values and collectives, but (jax 0.10.2) when a process is missing, killed
or stopped, the others abort with a C++ stack trace after 10 seconds or more. So every process also
connects to process 0, to send signs of life and the reason for its end, which all print.
"""

import contextlib
import itertools
import json
import os
import platform
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from resnet_flax.devices.place import Place
from resnet_flax.errors import UserError, first_line

_NAME = f"{platform.node() or 'localhost'}, pid {os.getpid()}"


class _Peer:
    """A connection to another process, for JSON objects, one a line; empty lines are ignored."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        self.socket, self._unread = connection, b""
        self.name = ""
        self.gone = threading.Event()

    def send(self, **message: Any) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next message; BlockingIOError after `timeout` seconds of silence."""
        # The kernel counts, and begins again when this process was stopped and goes on.
        patience = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        while b"\n" not in (unread := self._unread.lstrip()):
            part = self.socket.recv(4096)
            if not part or len(unread) > 100_000:
                raise ConnectionError("closed")
            self._unread = unread + part
        line, _, self._unread = unread.partition(b"\n")
        return json.loads(line)


_place = Place("", 1, 0)
_peers: dict[int, _Peer] = {}  # On process 0 all others, by index; on the others process 0.
_exchanges = itertools.count()
_ending, _leaving = threading.Lock(), threading.Event()


def initialize(place: Place, *, connect_timeout: float, peer_timeout: float) -> None:
    """Joins the other processes; call it before anything touches jax's devices.

    Raises:
      UserError: a process is missing after `connect_timeout` seconds, or they disagree on who they
        are. Later a process counts as lost after `peer_timeout` seconds without a sign of life.
    """
    if place.count == 1:
        return
    import jax

    connect(place, connect_timeout, peer_timeout)

    # JAX would take SIGTERM from the training loop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        *place[:3],
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=max(60, int(connect_timeout)),
        heartbeat_timeout_seconds=60 + int(2 * peer_timeout),  # Ours is first, and says more.
        shutdown_timeout_seconds=60,
    )


def connect(place: Place, timeout: float, peer_timeout: float) -> None:
    """The part of `initialize` before JAX."""
    global _place
    _place = place
    beat = min(5.0, peer_timeout / 10)
    threading.Thread(target=_give_signs_of_life, args=(beat,), daemon=True).start()
    host, _, port = place.address.rpartition(":")
    if is_first():
        _await_others(int(port), timeout, peer_timeout)
    else:
        _add(0, _report((host.strip("[]"), int(port)), timeout), peer_timeout)


def _add(index: int, peer: _Peer, timeout: float) -> None:
    _peers[index] = peer
    threading.Thread(target=_hear, args=(index, peer, timeout), daemon=True).start()


def _await_others(port: int, timeout: float, peer_timeout: float) -> None:
    deadline = time.monotonic() + timeout
    with _listen(port, min(timeout, 10)) as listener:
        while missing := [str(i) for i in range(1, count()) if i not in _peers]:
            who = f"process {', '.join(missing)} of {count()}"
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                peer = _Peer(listener.accept()[0])
            except TimeoutError as error:
                waited = f"waited {timeout:g} s (--connect_timeout) at {_place.address}"
                raise UserError(f"{waited} for {who}, in vain") from error
            try:
                hello = peer.receive(timeout=5)
                peer.name, i, total = (hello[key] for key in ("resnet_flax", "index", "count"))
            except (OSError, ValueError, LookupError, TypeError):
                continue  # Some other program.
            expected = total == count() and str(i) in missing
            _add(i if expected else -1, peer, peer_timeout)
            if not expected:
                raise UserError(
                    f"{peer.name} was started with --process_id={i} --num_processes={total}, "
                    f"where {_NAME} (--process_id=0) waits for {who}"
                )
    for peer in _peers.values():
        peer.send(welcome=_NAME)


def _listen(port: int, patience: float) -> socket.socket:
    """A listening socket; a job that has just ended may hold the port for some seconds."""
    deadline = time.monotonic() + patience
    options = {}
    if socket.has_dualstack_ipv6():
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    while True:
        try:
            return socket.create_server(("", port), backlog=1024, **options)
        except OSError as error:
            if time.monotonic() > deadline:
                reason = f"process 0 cannot listen at port {port}: {first_line(error)}"
                raise UserError(f"{reason}; choose another --coordinator port") from error
            time.sleep(0.2)


def _report(address: tuple[str, int], timeout: float) -> _Peer:
    deadline, reason = time.monotonic() + timeout, "timed out"
    while (left := deadline - time.monotonic()) > 0:
        try:
            peer = _Peer(socket.create_connection(address, timeout=left))
            if peer.socket.getsockname() == peer.socket.getpeername():
                # Linux connects a port of its own choice to itself where nobody listens there.
                raise ConnectionError("Connection refused")
            peer.send(resnet_flax=_NAME, index=index(), count=count())
            answer = peer.receive(left + 10)  # Process 0 will say who is missing.
        except (OSError, ValueError) as error:
            reason = first_line(error)
            time.sleep(0.2)
            continue
        if "failed" in answer:
            raise UserError(answer["failed"])
        peer.name = answer["welcome"]
        return peer
    raise UserError(
        f"process {index()} could not reach process 0 at {_place.address} within {timeout:g} s "
        f"(--connect_timeout): {reason}"
    )


def _hear(index: int, peer: _Peer, timeout: float) -> None:
    """Waits for the end of process `index`, or its news that another has ended."""
    lost = f"process {index} ({peer.name}) has"
    again = "; the same command, run again, goes on from the newest checkpoint"
    try:
        reason = peer.receive(timeout)["failed"]
    except BlockingIOError:
        reason = f"{lost} given no sign of life for {timeout:g} s (--peer_timeout){again}"
    except OSError:
        reason = f"{lost} gone{again}"
    peer.gone.set()
    if not _leaving.is_set():
        _end(reason, say=True)


def _give_signs_of_life(interval: float) -> None:
    while not _leaving.wait(interval):
        for peer in list(_peers.values()):
            with contextlib.suppress(OSError):  # `_hear` notices.
                peer.socket.sendall(b"\n")


def _end(reason: str, status: int = 1, say: bool = False) -> None:
    """Tells the others why, and leaves the program; process 0 leaves last."""
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # Another thread is just about to.
    if say:
        sys.stderr.write(f"error: {reason}\n")
    for peer in list(_peers.values()):
        with contextlib.suppress(OSError):
            peer.send(failed=reason)
    if is_first():
        # JAX's service ends with this process, and those who outlive it abort.
        deadline = time.monotonic() + 5
        for peer in list(_peers.values()):
            peer.gone.wait(max(0.0, deadline - time.monotonic()))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # Not sys.exit: JAX would wait for processes that are gone.


def count() -> int:
    """Number of processes."""
    return _place.count


def index() -> int:
    """Number of this process, from 0."""
    return _place.index


def is_first() -> bool:
    """Whether this process reads, writes and prints for all."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """Every process's `value`, by index; all must call it.

    Values are of dicts with str keys, lists, str, bool, int, float, None and numpy arrays.
    """
    if count() == 1:
        return [value]
    # Not multihost_utils, which needs the devices: their number depends on what is gathered.
    from flax import serialization
    from jax._src.distributed import global_state

    store, key = global_state.client, f"resnet_flax/{next(_exchanges)}"
    store.key_value_set_bytes(f"{key}/{index()}", serialization.msgpack_serialize(value))
    forever = 2**31 - 1  # In ms; a process that ends meanwhile ends this one too.
    everything = [store.blocking_key_value_get_bytes(f"{key}/{i}", forever) for i in range(count())]
    return [serialization.msgpack_restore(packed) for packed in everything]


def share(make: Callable[[], Any]) -> Any:
    """What `make()` returns on process 0, which alone calls it: a value that `gather` can send."""
    return gather(make() if is_first() else None)[0]


def fail(reason: str, status: int = 1) -> None:
    """Ends all processes, the others with the reason and status 1; one alone goes on."""
    if count() > 1:
        _end(f"process {index()} failed: {reason}", status)


def await_verdict() -> None:
    """Lets the news of another process's end arrive: a collective that fails does not name it."""
    if count() > 1:
        time.sleep(5)


def finish() -> None:
    """Waits until all processes are here, and leaves them."""
    if count() > 1:
        import jax

        gather(None)
        _leaving.set()
        jax.distributed.shutdown()  # Waits for all, so that nobody takes this for a death.
