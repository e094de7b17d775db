"""Signals, answered at once by a thread of their own.

Python runs handlers in the main thread, between two of its own instructions: late while XLA
compiles, and an exception raised inside a library's callback is dropped.
"""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class _Answer(NamedTuple):
    ask: Callable[[int], bool]
    before: dict[int, Any]  # The handlers that `ask` replaces, by signal.
    interrupting: set[int]  # Signals that now raise KeyboardInterrupt.


_answers: list[_Answer] = []  # The last one is in force.

# Where Python writes the numbers of signals, for a thread that lives as long as the process: one
# that ended before the threads of other libraries has made processes abort at their end.
_sink: int | None = None

# What one of our own programs does before it ends; None in any other, as in a notebook.
_farewell: Callable[[], None] | None = None


def end_on_interrupt(farewell: Callable[[], None] = lambda: None) -> None:
    """From here on, outside of `answered_by`, Ctrl-C ends the program with status 130.

    `farewell` is called first, in another thread.
    """
    global _farewell
    if _farewell is None:
        _answer(lambda number: True, (signal.SIGINT,))
    _farewell = farewell


@contextlib.contextmanager
def answered_by(ask: Callable[[int], bool], *numbers: signal.Signals) -> Iterator[None]:
    """Calls `ask(number)`, in another thread, for each of these signals that arrives.

    If it returns True, the program ends at once; a notebook gets a KeyboardInterrupt. Ignored
    signals, as under nohup, stay ignored. Outside of the main thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    restore = _answer(ask, numbers)
    try:
        yield
    finally:
        restore()


def _answer(ask: Callable[[int], bool], numbers: tuple[signal.Signals, ...]) -> Callable[[], None]:
    global _sink
    if _sink is None:
        source, _sink = os.pipe()
        os.set_blocking(_sink, False)
        threading.Thread(target=_watch, args=(source,), daemon=True).start()
    answer = _Answer(ask, {}, set())

    def handle(number, _):
        if number in answer.interrupting:
            raise KeyboardInterrupt

    sink_before = signal.set_wakeup_fd(_sink, warn_on_full_buffer=False)
    _answers.append(answer)
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            answer.before[number] = signal.signal(number, handle)

    def restore():
        for number, handler in answer.before.items():
            signal.signal(number, handler)
        _answers.pop()
        signal.set_wakeup_fd(sink_before)

    return restore


def _watch(source: int) -> None:
    while True:
        number = os.read(source, 1)[0]
        answer = _answers[-1] if _answers else _Answer(bool, {}, set())
        if number not in answer.before or number in answer.interrupting or not answer.ask(number):
            continue
        if _farewell:
            with contextlib.suppress(OSError):
                os.write(2, b"interrupted\n")
            _farewell()
            os._exit(128 + number)
        answer.interrupting.add(number)
        _thread.interrupt_main(number)
