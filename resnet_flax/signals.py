"""Signals, answered at once by a thread of their own.

Python runs a signal's handler in the main thread, between two of its own instructions. That is late
while XLA compiles, and an exception raised there is dropped where it hits a callback of a library.
"""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# What a program of ours does before it ends; None in a program that is not, as in a notebook.
_farewell: Callable[[], None] | None = None


def end_on_interrupt(farewell: Callable[[], None] = lambda: None) -> None:
    """From here on Ctrl-C ends the program with status 130, unless `answered_by` is in force.

    Args:
      farewell: called first, in another thread.
    """
    global _farewell
    if _farewell is None:
        _listen(lambda number: True, (signal.SIGINT,))
    _farewell = farewell


@contextlib.contextmanager
def answered_by(ask: Callable[[int], bool], *numbers: signal.Signals) -> Iterator[None]:
    """Calls `ask(number)`, in another thread, for each of these signals that arrives.

    Where it returns True the program ends at once; one that is not ours gets a KeyboardInterrupt.
    Signals that are ignored, as under nohup, stay so. Outside of the main thread, where Python
    handles no signals, this does nothing.
    """
    restore = _listen(ask, numbers)
    try:
        yield
    finally:
        restore()


def _listen(ask: Callable[[int], bool], numbers: tuple[signal.Signals, ...]) -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    final = set()

    def handle(number, frame):
        del frame
        if number in final:
            raise KeyboardInterrupt

    def watch():
        with open(source, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] not in {*old} - final or not ask(number[0]):
                    continue
                if _farewell:
                    with contextlib.suppress(OSError):
                        os.write(2, b"interrupted\n")
                    _farewell()
                    os._exit(128 + number[0])
                final.add(number[0])
                _thread.interrupt_main(number[0])

    source, sink = os.pipe()
    os.set_blocking(sink, False)
    heard = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    old = {n: signal.signal(n, handle) for n in heard}
    threading.Thread(target=watch, daemon=True).start()

    def restore():
        signal.set_wakeup_fd(before)
        for n, handler in old.items():
            signal.signal(n, handler)
        os.close(sink)

    return restore
