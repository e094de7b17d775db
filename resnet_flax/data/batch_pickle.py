"""Reads the pickled batches of CIFAR's Python archives without unpickling them.

A pickle is a program for a small stack machine that may import and call anything, so unpickling a
file from elsewhere is running it. The batches need very little of that machine: dicts, lists,
strings, numbers, and one fixed pattern that makes an array of bytes. This module walks the
instructions with the standard library's `pickletools.genops`, which only parses, and builds just
those; the first instruction or name outside of that is refused and nothing is ever called.
"""

import dataclasses
import pickletools
from typing import Any

import numpy as np

_MARK = object()

# The only names a batch may mention, under every spelling numpy and Python have given them.
_RECONSTRUCT = "array constructor"
_NDARRAY = "array type"
_DTYPE = "dtype"
_ENCODE = "encode"
_NAMES = {
    "numpy.core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _RECONSTRUCT,
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _DTYPE,
    "_codecs encode": _ENCODE,  # How Python 3 writes bytes in protocols 0 to 2.
}

_LITERALS = {
    "INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_PYTHON_2_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(ValueError):
    """The pickle holds something that no CIFAR batch holds, or is damaged."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that was mentioned; what it means is one of the constants above."""

    meaning: str


@dataclasses.dataclass
class _Array:
    """An array under construction; pickles make it empty and fill it later."""

    value: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Dtype:
    """A dtype; `text` is what was asked for, such as u1."""

    text: str


def read(data: bytes) -> dict[str, Any]:
    """Reads the dict of a pickled batch.

    Args:
      data: the whole file, in any pickle protocol up to 4.

    Returns:
      The dict. Keys are str, whichever of bytes and str they were; values are numbers, str, bytes,
      lists and uint8 arrays.

    Raises:
      RefusedError: the pickle is damaged, or asks for anything beyond the above.
    """
    try:
        result = _run(data)
    except RefusedError:
        raise
    except Exception as error:  # A damaged pickle may go wrong anywhere.
        raise RefusedError(f"damaged pickle: {error}") from error
    if not isinstance(result, dict):
        raise RefusedError(f"the pickle holds a {type(result).__name__}, not a dict")
    return {_text(key): _finished(value) for key, value in result.items()}


def _text(key: Any) -> str:
    """Returns a key as str; Python 2 wrote bytes."""
    if not isinstance(key, (bytes, str)):
        raise RefusedError(f"the pickle has a key of type {type(key).__name__}")
    return key.decode("latin-1") if isinstance(key, bytes) else key


def _finished(value: Any) -> Any:
    """Returns a value of the batch, an array instead of its place holder."""
    if isinstance(value, _Array):
        if value.value is None:
            raise RefusedError("the pickle has an array without content")
        return value.value
    if value is None or isinstance(value, (bool, int, str, bytes, list)):
        return value
    raise RefusedError(f"the pickle has a value of type {type(value).__name__}")


def _run(data: bytes) -> Any:
    """Runs the stack machine over the whole pickle and returns what is left on the stack."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for opcode, argument, position in pickletools.genops(data):
        op = opcode.name
        if op in ("PROTO", "FRAME"):
            continue
        elif op in _LITERALS:
            stack.append(argument)
        elif op in _PYTHON_2_STRINGS:
            stack.append(argument.encode("latin-1"))
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op == "MARK":
            stack.append(_MARK)
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op]())
        elif op == "DICT":
            items = pop_to_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif op == "LIST":
            stack.append(pop_to_mark())
        elif op == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif op in _TUPLES:
            items = stack[-_TUPLES[op] :]
            del stack[-_TUPLES[op] :]
            stack.append(tuple(items))
        elif op in ("APPEND", "APPENDS"):
            items = pop_to_mark() if op == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = pop_to_mark() if op == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else argument] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            if op == "STACK_GLOBAL":
                argument = " ".join(_expect(item, str) for item in (stack.pop(-2), stack.pop()))
            if argument not in _NAMES:
                raise RefusedError(f"the pickle asks for {argument.replace(' ', '.')!r}")
            stack.append(_Name(_NAMES[argument]))
        elif op == "REDUCE":
            arguments = _expect(stack.pop(), tuple)
            stack.append(_reduce(stack.pop(), arguments))
        elif op == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif op == "STOP":
            (result,) = stack
            return result
        else:
            raise RefusedError(f"the pickle has the instruction {op} at byte {position}")
    raise RefusedError("the pickle does not end")


def _expect(value: Any, kind: type) -> Any:
    """Returns `value` if it is of that very type."""
    if type(value) is not kind:
        raise RefusedError(f"the pickle has a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _reduce(function: Any, arguments: tuple) -> Any:
    """Stands in for the three calls a batch may contain; calls nothing that it was given."""
    meaning = function.meaning if isinstance(function, _Name) else None
    if meaning == _ENCODE and len(arguments) == 2 and arguments[1] == "latin1":
        return _expect(arguments[0], str).encode("latin-1")
    if meaning == _RECONSTRUCT and arguments and arguments[0] == _Name(_NDARRAY):
        return _Array()
    if meaning == _DTYPE and arguments:
        return _Dtype(_text(arguments[0]))
    raise RefusedError(f"the pickle calls {meaning or type(function).__name__!r} in an unknown way")


def _build(target: Any, state: Any) -> None:
    """Fills an array with its content; the state of a dtype says nothing about single bytes."""
    if isinstance(target, _Dtype):
        return
    if not isinstance(target, _Array):
        raise RefusedError(f"the pickle fills a {type(target).__name__}")
    _, shape, dtype, by_columns, content = _expect(state, tuple)
    if not isinstance(dtype, _Dtype) or dtype.text not in ("u1", "|u1", "uint8"):
        raise RefusedError(f"the pickle has an array of {getattr(dtype, 'text', dtype)!r}, not u1")
    flat = np.frombuffer(_expect(content, bytes), np.uint8)
    sizes = tuple(_expect(size, int) for size in _expect(shape, tuple))
    if any(size < 0 for size in sizes):  # reshape would work out a -1 by itself.
        raise RefusedError(f"the pickle has an array of shape {sizes}")
    target.value = flat.reshape(sizes, order="F" if by_columns else "C")
