"""What a person sees while a run goes on, and at its end."""

import contextlib
import io
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from resnet_flax.errors import UserError

# Key of what a finished program of several seeds returns, see `train.train`.
SEEDS = "seeds"

# Seconds of silence before `Progress.waiting` says anything.
_PATIENCE = 5


class _Stream(io.FileIO):
    """Standard output or error that drops what nobody can read any more."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # A result that does not fit on a disk is missed; a line of progress is not.
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                raise
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Lets a process go on without its terminal, its pipe (`| head`), or any stream at all."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file opened would be the one that messages are written to.
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Stream(number, "w", closefd=False)),
            encoding=old.encoding if old else "utf-8",
            errors=old.errors if old else "replace",
            line_buffering=old.line_buffering if old else False,
        )
        setattr(sys, name, stream)


class Progress:
    """A bar on a terminal, a line every half minute elsewhere.

    Shows step, loss, error, learning rate, images/s and the time left.
    """

    def __init__(self, process: int = 0, seconds_between_lines: float = 30.0):
        """Of several processes only the first shows steps."""
        self._pause, self._process = seconds_between_lines, process
        self._terminal = sys.stderr.isatty()
        self._bar = None

    def start(self, total_steps: int, step: int) -> None:
        """Shows a run of `total_steps` of which `step` are done."""
        self._total, self._step = total_steps, step
        self._start = None
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            disable=not self._terminal or self._process > 0,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def update(
        self, step: int, loss: float, error: float, rate: float, images_per_second: float
    ) -> None:
        """Shows the results of the steps up to `step`."""
        done, self._step = step - self._step, step
        if self._process:
            return
        text = f"batch loss {loss:.3f}  batch error {100 * error:.1f} %  rate {rate:.3g}  "
        text += f"{images_per_second:,.0f} images/s"
        now = time.monotonic()
        if self._start is None:
            # Compilation is over: the steps that follow tell the time left.
            self._start = now, step
            self._bar.unpause()
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done)
        elif now - self._last_line >= self._pause or step == self._total:
            self._last_line = now
            began, first = self._start
            if step > first:
                left = (now - began) / (step - first) * (self._total - step)
                text += f"  {tqdm.format_interval(left)} left"
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar; of several processes only the first does."""
        if not self._process:
            self.warn(line)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Says on a terminal how long `what` has lasted, after 5, 10, 20, … seconds."""
        over = threading.Event()

        def tell() -> None:
            seconds = pause = _PATIENCE
            while not over.wait(pause):
                self.say(f"{what}: {seconds} s")
                seconds, pause = 2 * seconds, seconds

        thread = threading.Thread(target=tell, daemon=True)
        if self._terminal and not self._process:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.is_alive():
                thread.join()

    def warn(self, line: str) -> None:
        """Prints a line about this process."""
        tqdm.write(f"process {self._process}: {line}" if self._process else line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def summary(result: dict[str, Any], directory: pathlib.Path) -> str:
    """The last words of a finished run: what was learned, where it lies, what to run next.

    Args:
      result: see `train.train`.
      directory: of the run, or the parent of the runs of several seeds.

    Raises:
      UserError: the result is not one of a finished run.
    """
    if SEEDS in result:
        each = []
        for one in result[SEEDS]:
            name = f"seed{one['seed']}"
            each.append(f"{name}: {_summary(one, directory / name)}")
        together = f"  python -m resnet_flax.tools.report {directory} --out={directory}/report"
        return "\n".join([*each, "Each is an ordinary run. Together:", together])
    lines = [_summary(result, directory)]
    if result["data"] == "digits":
        learned = result["test_error_last"] < 0.1
        praise = "It has learned to read handwritten digits. " if learned else ""
        lines.append(f"{praise}Next, CIFAR-10 in ten epochs:")
        lines.append("  python -m resnet_flax.main --config=configs/cifar10_short.py")
    return "\n".join(lines)


def _summary(result: dict[str, Any], directory: pathlib.Path) -> str:
    try:
        return (
            f"{result['model']} on {result['data']}: {100 * result['test_error_last']:.2f} % test "
            f"error ({result['test_wrong_last']} of {result['test_examples']} wrong) after "
            f"{result['steps']} steps in {result['seconds']:.0f} s.\n"
            f"Curves: {directory / 'curves.png'}  results: {directory / 'result.json'}  weights: "
            f"{directory / 'weights.safetensors'}"
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'result.json'} lacks {error}; delete it to redo") from error
