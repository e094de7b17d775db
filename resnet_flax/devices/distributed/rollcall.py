"""How processes find each other: all report to the first, on the coordinator's port."""

import contextlib
import os
import platform
import queue
import socket
import struct
import threading
import time
from typing import Any

import flax.serialization

from resnet_flax.devices.distributed.place import Place
from resnet_flax.errors import UserError

_PROGRAM = "resnet_flax"
# A stranger's first bytes are not to be taken for a length.
_LONGEST_GREETING = 10_000


class Link:
    """A connection to another process: whole messages, and when it was last heard of.

    Attributes:
      name: "HOST, pid N".
      heard: `time.monotonic()` of the last byte received.
      inbox: values received and not yet asked for.
      closed: set when nothing more will be received.
    """

    def __init__(self, connection: socket.socket):
        """Speaks over `connection`."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.name, self.heard = "", time.monotonic()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.closed = threading.Event()
        self._connection, self._lock = connection, threading.Lock()

    def send(self, *, patience: float = -1, **message: Any) -> None:
        """Sends a message.

        Args:
          patience: seconds to wait while another message is under way, then this one is dropped;
            -1: as long as it takes.
          **message: of what `flax.serialization` packs.

        Raises:
          OSError: the other end is gone.
        """
        content = flax.serialization.msgpack_serialize(message)
        if self._lock.acquire(timeout=patience):
            try:
                self._connection.sendall(struct.pack(">Q", len(content)) + content)
            finally:
                self._lock.release()

    def receive(self, timeout: float | None = None, longest: int = 2**40) -> dict[str, Any]:
        """The next message; raises OSError where there is none within `timeout` seconds."""
        self._connection.settimeout(timeout)
        (length,) = struct.unpack(">Q", self._read(8))
        if length > longest:
            raise ConnectionError("another program's message")
        content = self._read(length)
        self._connection.settimeout(None)
        return flax.serialization.msgpack_restore(content)

    def _read(self, length: int) -> bytes:
        content = bytearray()
        while len(content) < length:
            part = self._connection.recv(min(length - len(content), 2**20))
            if not part:
                raise ConnectionError("closed")
            content += part
            self.heard = time.monotonic()
        return bytes(content)

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


def meet(place: Place, timeout: float) -> dict[int, Link]:
    """Waits until all processes are there.

    Args:
      place: this process's.
      timeout: seconds.

    Returns:
      On the first process the links to all others, by index; on the others the link to it.

    Raises:
      UserError: some did not come in time, or they do not agree on who they are.
    """
    deadline = time.monotonic() + timeout
    return (
        {0: _report(place, timeout, deadline)} if place.index else _call(place, timeout, deadline)
    )


def _call(place: Place, timeout: float, deadline: float) -> dict[int, Link]:
    links: dict[int, Link] = {}
    with _listen(place, min(deadline, time.monotonic() + 10)) as listener:
        while len(links) < place.count - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.count) if i not in links]
                _refuse(
                    links,
                    f"process 0 waited {timeout:g} s (--connect_timeout) at {place.address} for "
                    f"process {', '.join(missing)} of {place.count}, in vain",
                )
            link = Link(connection)
            try:
                hello = link.receive(timeout=5, longest=_LONGEST_GREETING)
                index, claimed = hello[_PROGRAM], hello["count"]
                link.name = hello["name"]
            except Exception:
                link.close()  # A stranger: a port scanner, another program.
                continue
            if claimed != place.count:
                _refuse(
                    links | {-1: link},
                    f"process {index} ({link.name}) was started with --num_processes={claimed}, "
                    f"process 0 with --num_processes={place.count}",
                )
            if index in links or index == 0:
                other = links[index].name if index in links else _own_name()
                _refuse(
                    links | {-1: link},
                    f"two processes were started with --process_id={index}: {other}; {link.name}",
                )
            links[index] = link
    for link in links.values():
        link.send(welcome=_own_name())
    return links


def _refuse(links: dict[int, Link], reason: str) -> None:
    for link in links.values():
        with contextlib.suppress(OSError):
            link.send(refused=reason)
        link.close()
    raise UserError(reason)


def _listen(place: Place, deadline: float) -> socket.socket:
    """A listening socket; a job that has just ended may hold the port for some seconds."""
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", place.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
            return socket.create_server(("", place.port), backlog=1024)
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 cannot listen at port {place.port}: {error.strerror}; choose "
                    "another --coordinator port"
                ) from error
            time.sleep(0.2)


def _report(place: Place, timeout: float, deadline: float) -> Link:
    reason = "timed out"
    while (left := deadline - time.monotonic()) > 0:
        link = None
        try:
            link = Link(_connect(place, left))
            link.send(**{_PROGRAM: place.index}, count=place.count, name=_own_name())
            # Process 0 will say who is missing: wait for its word a little longer than it does.
            answer = link.receive(timeout=left + 10)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if link:
                link.close()
            time.sleep(0.2)
            continue
        if "refused" in answer:
            link.close()
            raise UserError(answer["refused"])
        link.name = answer["welcome"]
        return link
    raise UserError(
        f"process {place.index} could not reach process 0 at {place.address} within {timeout:g} s "
        f"(--connect_timeout): {reason}"
    )


def _connect(place: Place, timeout: float) -> socket.socket:
    connection = socket.create_connection((place.host, place.port), timeout=timeout)
    if connection.getsockname() == connection.getpeername():
        # Linux connects a port of its own choice to itself, where nobody listens there.
        connection.close()
        raise ConnectionError("Connection refused")
    return connection


def _own_name() -> str:
    return f"{platform.node() or 'localhost'}, pid {os.getpid()}"
