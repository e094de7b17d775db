"""Counts what a compiled program executes in a training step, from XLA's own texts."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from resnet_flax.errors import UserError

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_LOOP = re.compile(r" while\(.*\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ALL_REDUCE = re.compile(r" all-reduce(?:-start)?\(")
_THUNK = re.compile(r"\s*\d+: (k\w+)")

# Thunks that only hold others (a copied slice is a kDynamicSliceFusion around a copy), and thunks
# that launch nothing.
_HOLDERS = {"kAsyncStart", "kDynamicSlice", "kDynamicSliceFusion", "kSequential"}
_SILENT = {"kAsyncDone", "kWaitForStreams"}
_DIFFERENT = "the program and the list of its launches have different loops"

# What XLA's runtime for GPUs executes: its kind, and the parts of a loop or a CUDA graph.
_Thunk = tuple[str, list["_Thunk"]]


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

    def loops(self, name: str) -> list[tuple[int, str]]:
        matches = [match for line in self.lines[name] if (match := _LOOP.search(line))]
        return [(self.turns(match.string), match[2]) for match in matches]

    def total(self, name: str, own: Callable[[str], int]) -> int:
        # Where a line has a number of its own, what it calls is part of that number.
        found = 0
        for line in self.lines.get(name, ()):
            if number := own(line):
                found += number
            elif " conditional(" in line:
                raise UserError("which branch of the program is taken cannot be told")
            elif inner := sum(self.total(called, own) for called in _CALLED.findall(line)):
                found += inner * (self.turns(line) if _LOOP.search(line) else 1)
        return found


def _read_thunks(text: str) -> list[_Thunk]:
    top: list[_Thunk] = []
    above, in_condition = [(-1, top)], False
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            # Conditions are not indented. With a known number of turns none is executed.
            in_condition = line.strip() == "condition:"
        elif not in_condition and (match := _THUNK.match(line)):
            indent, parts = len(line) - len(line.lstrip()), []
            while above[-1][0] >= indent:
                above.pop()
            above[-1][1].append((match[1], parts))
            above.append((indent, parts))
    return top


def _launches(thunks: Sequence[_Thunk], program: _Program, name: str) -> tuple[int, int]:
    # The loops of the computation and of its thunks are in the same order.
    loops = iter(program.loops(name))

    def count(thunks):
        launches = submissions = 0
        for kind, parts in thunks:
            if kind == "kWhile":
                turns, body = next(loops, (0, None))
                if body is None:
                    raise UserError(_DIFFERENT)
                inside, issued = (turns * n for n in _launches(parts, program, body))
            elif kind == "kCommandBuffer":
                inside, issued = count(parts)[0], 1
            elif kind in _HOLDERS:
                inside, issued = count(parts)
            elif parts or kind == "kConditional":
                raise UserError(f"what a thunk of the kind {kind} executes cannot be told")
            else:
                inside = issued = int(kind not in _SILENT)
            launches, submissions = launches + inside, submissions + issued
        return launches, submissions

    found = count(thunks)
    if next(loops, None):
        raise UserError(_DIFFERENT)
    return found


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
    program, found, step, thunks = _Program(text), {}, "ENTRY", _read_thunks(thunk_text)
    try:
        if steps > 1:
            # The largest loop; others fill or convert arrays.
            loops = program.loops("ENTRY")
            sizes = [len(program.lines[body]) for _, body in loops] or [0]
            index = sizes.index(max(sizes))
            if not loops or loops[index][0] != steps:
                raise UserError(f"the program has no loop of {steps} turns")
            step = loops[index][1]
            whiles = [parts for kind, parts in thunks if kind == "kWhile"]
        found["all_reduces"] = program.total(step, lambda line: len(_ALL_REDUCE.findall(line)))
        if platform == "tpu":
            for key, name in (("cycles_per_step", step), ("cycles_per_chunk", "ENTRY")):
                found[key] = program.total(name, lambda line: sum(map(int, _CYCLES.findall(line))))
        elif not thunks:
            raise UserError("XLA has written no list of launches")
        elif steps > 1 and len(whiles) != len(loops):
            raise UserError(_DIFFERENT)
        else:
            parts = whiles[index] if steps > 1 else thunks
            found["launches"], found["host_submissions"] = _launches(parts, program, step)
    except UserError as error:
        found["error"] = str(error)
    return found
