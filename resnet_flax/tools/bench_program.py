"""Counts what a compiled program executes in a training step, from XLA's own texts."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from resnet_flax.errors import UserError

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_LOOP = re.compile(r" while\(.*\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ALL_REDUCE = re.compile(r" all-reduce(?:-start)?\(")
_THUNK = re.compile(r"( *)\d+: (k\w+)")

# What XLA's runtime for GPUs executes are thunks. These hold others (a copied slice is a
# kDynamicSliceFusion around a copy), and these launch nothing.
_HOLDERS = {
    "kAsyncStart", "kCommandBuffer", "kDynamicSlice", "kDynamicSliceFusion", "kSequential",
    "kWhile",
}  # fmt: skip
_SILENT = {"kAsyncDone", "kWaitForStreams"}


class _Program:
    def __init__(self, text: str):
        # The lines of each computation by its name, of the first by "ENTRY".
        self.lines: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in text.splitlines():
            if match := _HEAD.match(line):
                lines = self.lines["ENTRY" if match[1] else match[2]] = []
            else:
                lines.append(line)

    def turns(self, loop: str) -> int:
        if match := _KNOWN_TURNS.search(loop):
            return int(match[1])
        # The loop is jax's or XLA's own: it counts from 0 by ones to a constant.
        lines = self.lines.get(_LOOP.search(loop)[1], ())
        for bound in filter(None, map(_BOUND.search, lines)):
            constant = re.compile(rf"%{re.escape(bound[1])} = .* constant\((\d+)\)")
            for match in filter(None, map(constant.search, lines)):
                return int(match[1])
        raise UserError("how often a loop of the program turns cannot be told")

    def loops(self, name: str) -> Iterator[tuple[int, str]]:
        """Turns and body of the loops in a computation, each followed by the loops inside it."""
        for line in self.lines[name]:
            if match := _LOOP.search(line):
                yield self.turns(line), match[2]
                yield from self.loops(match[2])

    def step(self, steps: int) -> str:
        """The computation that is one of the chunk's steps."""
        if steps == 1:
            return "ENTRY"
        bodies = [body for turns, body in self.loops("ENTRY") if turns == steps]
        if not bodies:
            raise UserError(f"the program has no loop of {steps} turns")
        # Other loops fill or convert arrays.
        return max(bodies, key=lambda body: len(self.lines[body]))

    def total(self, name: str, own: Callable[[str], int]) -> int:
        """The sum of `own(line)` over what a computation executes.

        Where a line has a number of its own, what it calls is part of that number.
        """
        found = 0
        for line in self.lines.get(name, ()):
            if number := own(line):
                found += number
            elif " conditional(" in line:
                raise UserError("which branch of the program is taken cannot be told")
            elif inner := sum(self.total(called, own) for called in _CALLED.findall(line)):
                found += inner * (self.turns(line) if _LOOP.search(line) else 1)
        return found


class _Holder(NamedTuple):
    indent: int
    kind: str
    times: int  # that a step executes what it holds
    in_graph: bool


def _launches(text: str, program: _Program, step: str) -> dict[str, int]:
    """`launches` and `host_submissions` of a step, from XLA's list of thunks."""
    if not text:
        raise UserError("XLA has written no list of launches")
    loops = list(program.loops("ENTRY"))
    if text.count(": kWhile ") != len(loops):
        raise UserError("the program and the list of its launches have different loops")
    remaining, in_condition = iter(loops), False
    launches = submissions = 0
    above = [_Holder(-1, "kSequential", int(step == "ENTRY"), False)]
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            # Conditions are not indented. With a known number of turns none is executed.
            in_condition = line.strip() == "condition:"
        if in_condition or not (match := _THUNK.match(line)):
            continue
        indent, kind = len(match[1]), match[2]
        while above[-1].indent >= indent:
            above.pop()
        _, holder, times, in_graph = above[-1]
        if holder not in _HOLDERS or kind == "kConditional":
            unknown = kind if holder in _HOLDERS else holder
            raise UserError(f"what a thunk of the kind {unknown} executes cannot be told")
        is_launch = kind not in _HOLDERS | _SILENT
        launches += times * is_launch
        submissions += times * (not in_graph and (is_launch or kind == "kCommandBuffer"))
        if kind == "kWhile":
            turns, body = next(remaining)
            times = 1 if body == step else times * turns
        above.append(_Holder(indent, kind, times, in_graph or kind == "kCommandBuffer"))
    return {"launches": launches, "host_submissions": submissions}


def count(text: str, thunk_text: str, platform: str, steps: int) -> dict[str, Any]:
    """What one of the `steps` of a chunk executes; loops inside it count as often as they turn.

    Args:
      text: `compiled.as_text()` of the chunk.
      thunk_text: XLA's list of what the chunk launches on a GPU.
      platform: "gpu" or "tpu".
      steps: of the chunk.

    Returns:
      `all_reduces`; for a GPU `launches` (kernels, library calls, copies and memory fills, inside
      CUDA graphs too) and `host_submissions` (a CUDA graph is one); for a TPU `cycles_per_step` and
      `cycles_per_chunk`, as its compiler estimates them. `error` says why the rest is missing.
    """
    found: dict[str, Any] = {}
    try:
        program = _Program(text)
        step = program.step(steps)
        found["all_reduces"] = program.total(step, lambda line: len(_ALL_REDUCE.findall(line)))
        if platform == "gpu":
            found |= _launches(thunk_text, program, step)
        else:
            for key, name in (("cycles_per_step", step), ("cycles_per_chunk", "ENTRY")):
                found[key] = program.total(name, lambda line: sum(map(int, _CYCLES.findall(line))))
    except UserError as error:
        found["error"] = str(error)
    return found
