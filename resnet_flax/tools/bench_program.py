"""What a compiled program executes in a training step, read from XLA's own texts.

Loops inside a step count as often as they turn. Where a program does not say how often that is, its
loops are jax's and XLA's own: they count from 0 by ones to a constant.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from resnet_flax.errors import UserError

# The lines of each computation by its name, of the first by "ENTRY".
Program = Mapping[str, Sequence[str]]

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BOUND = re.compile(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ALL_REDUCE = re.compile(r" all-reduce(?:-start)?\(")


def read_program(text: str) -> Program:
    """The computations of `compiled.as_text()`."""
    program: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := _HEAD.match(line):
            lines = program["ENTRY" if match[1] else match[2]] = []
        else:
            lines.append(line)
    return program


def turns(program: Program, loop: str) -> int:
    """How often the loop of this line of the program turns.

    Raises:
      UserError: that cannot be told.
    """
    if match := _KNOWN_TURNS.search(loop):
        return int(match[1])
    condition = _CONDITION.search(loop)
    lines = program.get(condition[1], ()) if condition else ()
    for bound in filter(None, map(_BOUND.search, lines)):
        constant = re.compile(rf"%{re.escape(bound[1])} = .* constant\((\d+)\)")
        for match in filter(None, map(constant.search, lines)):
            return int(match[1])
    raise UserError("how often a loop of the program turns cannot be told")


def _loops(program: Program, name: str) -> list[str]:
    return [line for line in program[name] if " while(" in line]


def _body(loop: str) -> str:
    return next(m[1] for m in _CALLED.finditer(loop) if m[0].startswith("body"))


def total(program: Program, name: str, own: Callable[[str], int]) -> int:
    """The sum of `own(line)` over the computation of that name and all that it executes.

    Where a line has a number of its own, what it calls is part of that.

    Raises:
      UserError: how often something is executed cannot be told.
    """
    found = 0
    for line in program.get(name, ()):
        if number := own(line):
            found += number
        elif " conditional(" in line:
            raise UserError("which branch of the program is taken cannot be told")
        elif inner := sum(total(program, called, own) for called in _CALLED.findall(line)):
            found += inner * (turns(program, line) if " while(" in line else 1)
    return found


def cycles(line: str) -> int:
    """Of an instruction, as the TPU's compiler estimates them."""
    return sum(map(int, _CYCLES.findall(line)))


def all_reduces(line: str) -> int:
    """1 for an all-reduce, else 0."""
    return len(_ALL_REDUCE.findall(line))


def _step_index(program: Program, steps: int) -> int:
    """Which of the first computation's loops is the one over the steps of a chunk."""
    loops = _loops(program, "ENTRY")
    found = [i for i, loop in enumerate(loops) if turns(program, loop) == steps]
    if not found:
        raise UserError(f"the program has no loop of {steps} turns")
    return max(found, key=lambda i: len(program[_body(loops[i])]))


def step_name(program: Program, steps: int) -> str:
    """The name of the computation that is one step of a chunk of so many.

    Raises:
      UserError: there is no loop that turns so often.
    """
    if steps == 1:
        return "ENTRY"
    return _body(_loops(program, "ENTRY")[_step_index(program, steps)])


@dataclasses.dataclass
class Thunk:
    """What XLA's runtime for GPUs executes: its kind, and the parts of a loop or a CUDA graph."""

    kind: str
    parts: list["Thunk"] = dataclasses.field(default_factory=list)


_THUNK = re.compile(r"\s*\d+: (k\w+)")

# Those that only hold others (a slice that is copied is a kDynamicSliceFusion around a copy), and
# those that launch nothing.
_HOLDERS = {"kAsyncStart", "kDynamicSlice", "kDynamicSliceFusion", "kSequential"}
_SILENT = {"kAsyncDone", "kWaitForStreams"}

_DIFFERENT = "the program and the list of its launches have different loops"


def read_thunks(text: str) -> list[Thunk]:
    """XLA's list of a program's thunks, each indented under the one that holds it."""
    whole = Thunk("kSequential")
    above, in_condition = [(-1, whole)], False
    for line in text.splitlines():
        if line.strip() in ("condition:", "body:"):
            # Conditions are not indented; with a known number of turns none is executed.
            in_condition = line.strip() == "condition:"
        elif not in_condition and (match := _THUNK.match(line)):
            indent = len(line) - len(line.lstrip())
            while above[-1][0] >= indent:
                above.pop()
            thunk = Thunk(match[1])
            above[-1][1].parts.append(thunk)
            above.append((indent, thunk))
    return whole.parts


def _whiles(thunks: Sequence[Thunk]) -> int:
    """How many loops there are, without those inside others."""
    return sum(1 if thunk.kind == "kWhile" else _whiles(thunk.parts) for thunk in thunks)


def _count(thunks: Sequence[Thunk], program: Program, name: str) -> tuple[int, int]:
    """Launches, and submissions from the host, of the thunks of the computation of that name."""
    loops = iter(_loops(program, name))
    if _whiles(thunks) != len(_loops(program, name)):
        raise UserError(_DIFFERENT)

    def count(thunks):
        pairs = [count_one(thunk) for thunk in thunks]
        return sum(inside for inside, _ in pairs), sum(issued for _, issued in pairs)

    def count_one(thunk):
        if thunk.kind == "kWhile":
            loop = next(loops)
            inside, issued = _count(thunk.parts, program, _body(loop))
            return turns(program, loop) * inside, turns(program, loop) * issued
        if thunk.kind == "kCommandBuffer":
            return count(thunk.parts)[0], 1
        if thunk.kind in _HOLDERS:
            return count(thunk.parts)
        if thunk.parts or thunk.kind == "kConditional":
            raise UserError(f"what a thunk of the kind {thunk.kind} executes cannot be told")
        return (0, 0) if thunk.kind in _SILENT else (1, 1)

    return count(thunks)


def launches(thunks: Sequence[Thunk], program: Program, steps: int) -> tuple[int, int]:
    """What a GPU executes in a step, and how much of it the host issues one by one.

    Args:
      thunks: from `read_thunks`.
      program: the same.
      steps: of the chunk.

    Returns:
      The number of kernels, calls of libraries, copies and fillings of memory, those in CUDA graphs
      too; the number of submissions, of which a CUDA graph is one.

    Raises:
      UserError: they cannot be told.
    """
    if not thunks:
        raise UserError("XLA has written no list of launches")
    if steps > 1:
        whiles = [thunk for thunk in thunks if thunk.kind == "kWhile"]
        if len(whiles) != len(_loops(program, "ENTRY")):
            raise UserError(_DIFFERENT)
        thunks = whiles[_step_index(program, steps)].parts
    return _count(thunks, program, step_name(program, steps))
