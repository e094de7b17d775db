"""The processes of a run once they have found each other."""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from resnet_flax.devices.distributed.rollcall import Link

# How long the first process, at its end, waits for the others to have read why, in seconds.
_LAST_WORDS = 5.0


class Group:
    """A star of links with the first process in the middle.

    A thread for each link reads it; one more sends signs of life and looks for theirs.
    """

    def __init__(self, index: int, count: int, links: dict[int, Link], timeout: float):
        """Begins to listen.

        Args:
          index: of this process.
          count: number of processes.
          links: as from `rollcall.meet`.
          timeout: seconds without a sign of life after which a process counts as lost.
        """
        self.index, self.count = index, count
        self._links, self._timeout = links, timeout
        self._interval = min(5.0, timeout / 10)
        self._exchanges = 0
        self._ending, self._leaving = threading.Lock(), threading.Event()
        now = time.monotonic()
        for link in links.values():
            link.heard = now
        for i in links:
            threading.Thread(target=self._listen, args=(i,), daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, on all."""
        self._exchanges += 1
        if self.index:
            self._links[0].send(exchange=self._exchanges, value=value)
            return self._take(0)
        values = [value, *(self._take(i) for i in sorted(self._links))]
        self._send_all(values)
        return values

    def share(self, make: Callable[[], Any]) -> Any:
        """The first process's `make()`, on all."""
        self._exchanges += 1
        if self.index:
            return self._take(0)
        value = make()
        self._send_all(value)
        return value

    def _send_all(self, value: Any) -> None:
        for link in self._links.values():
            link.send(exchange=self._exchanges, value=value)

    def _take(self, index: int) -> Any:
        while True:
            # Not for ever at once: signals are handled in between.
            with contextlib.suppress(queue.Empty):
                message = self._links[index].inbox.get(timeout=0.5)
                break
        if message["exchange"] != self._exchanges:
            raise RuntimeError(
                f"process {index} is at exchange {message['exchange']}, process {self.index} at "
                f"{self._exchanges}"
            )
        return message["value"]

    def _listen(self, index: int) -> None:
        link = self._links[index]
        try:
            while True:
                message = link.receive()
                if "failed" in message:
                    self.end(message["failed"], say=message["failed"])
                elif "value" in message:
                    link.inbox.put(message)
                elif "bye" in message:
                    return
        except OSError as error:
            link.closed.set()
            reason = "" if str(error) == "closed" else f": {error}"
            self._lose(f"process {index} ({link.name}) has gone{reason}")
        finally:
            link.closed.set()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._leaving.wait(self._interval):
            now = time.monotonic()
            if now - before > 3 * self._interval + 1:
                # It was this process that stood still; what the others sent waits to be read.
                for link in self._links.values():
                    link.heard = now
            before = now
            for index, link in self._links.items():
                if link.closed.is_set():
                    continue
                if now - link.heard > self._timeout:
                    link.closed.set()  # There is no waiting for it any more.
                    self._lose(
                        f"process {index} ({link.name}) has given no sign of life for "
                        f"{self._timeout:g} s (--peer_timeout)"
                    )
                with contextlib.suppress(OSError):  # The link's reader finds out why.
                    link.send(patience=0, beat=True)  # A message under way is a sign as well.

    def _lose(self, what: str) -> None:
        if not self._leaving.is_set():
            how = "; the same command, run again, goes on from the newest checkpoint"
            self.end(what, say=what + how)

    def end(self, reason: str, status: int = 1, say: str | None = None) -> None:
        """Tells the others why, and leaves the program; the first process leaves last."""
        if not self._ending.acquire(blocking=False):
            time.sleep(3 * _LAST_WORDS)  # Another thread is just about to.
        if say:
            print(f"error: {say}", file=sys.stderr)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.send(patience=1, failed=reason)
        if not self.index:
            # JAX's service ends with this process, and those who outlive it abort.
            deadline = time.monotonic() + _LAST_WORDS
            for link in self._links.values():
                link.closed.wait(max(0.0, deadline - time.monotonic()))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # Not sys.exit: JAX would wait for processes that are gone.
        os._exit(status)

    def finish(self) -> None:
        """Parts from the others, when all are here."""
        self.gather(None)
        self._leaving.set()
        for link in self._links.values():
            with contextlib.suppress(OSError):  # It may have parted first.
                link.send(bye=True)
