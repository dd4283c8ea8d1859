"""Limits that keep a small weight file from using much memory or time, each with its distance from real files.

The figures for real files are those of a checkpoint from the middle of a YOLO12-X training with 1,000 epochs in its
results: 3,144 records, a pickle of 665 KB with 216,000 opcodes, nested 20 deep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum
from types import FunctionType, MethodType
from typing import Any

import torch

__all__ = ["Budget", "LimitError", "check_structure"]

MAX_RECORDS = 100_000
"""Number of records in an archive. A real file has 3,144."""

MAX_DIRECTORY_BYTES = 16 << 20
"""Size of the directory of an archive. A real one has 200 KB."""

MAX_INFLATION = 10
"""Size of all records together, divided by the size of the file. `torch.save` does not compress, so it is 1; weights
that `zip` compressed are at 1.1, and a small file with a pickle is at 4."""

MAX_PICKLE_BYTES = 32 << 20
"""Size of the pickle. A real one has 0.7 MB."""

MAX_STEPS = 4_000_000
"""Number of steps to read the pickle: one for an opcode and for each item that it copies, more if it makes an object.
A step needs about 100 bytes and a microsecond. A real file takes 400,000."""

MAX_TENSOR_EXPANSION = 8
SMALL_FILE_BYTES = 64 << 20
"""Sum of the sizes of all tensors: at most `MAX_TENSOR_EXPANSION * file + SMALL_FILE_BYTES`. Strides can make a tensor
larger than its storage, and a copy of the tensor then needs its full size. A real file is at 1.2, as parameters are
counted twice."""

MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**40
"""Elements of a `torch.Size`, or of an array. The largest tensor of a real file has 10 million."""

MAX_DEPTH = 100
"""Nesting of the object. Functions that recurse, such as `repr` and `deepcopy`, need a few frames for each level. A
real file has 20 levels."""

MAX_UNROLLED = 4_000_000
"""Number of objects if a shared object is counted each time it is used, as `repr` and `hash` do. A long string counts
as one object for each 64 characters. A real file has 55,000."""

MAX_TEXT = 300
"""Characters of a name, a path part or a device. A real file has at most 100."""

MAX_REFUSED = 50
"""Number of names in the message that refuses a file."""


class LimitError(Exception):
    """A file goes over one of these limits. The message names it, to complete `The file has ...`."""


def check_limit(number: int, limit: int, what: str) -> None:
    """Raise `LimitError` if a number is over its limit."""
    if number > limit:
        raise LimitError(f"{what} (the limit is {limit:,})")


def length(thing: Any) -> int:
    """Return the number of steps that copying an argument takes."""
    if isinstance(thing, (str, bytes)):
        return len(thing) // 64
    return len(thing) if isinstance(thing, (list, tuple, dict, set, frozenset)) else 0


def volume(sizes: Iterable[int]) -> int:
    """Return the product of some sizes, in which a size of zero counts as one: other operations may leave it out."""
    return math.prod(max(size, 1) for size in sizes)


class Budget:
    """Steps and tensor bytes that reading one file has used.

    Args:
        file_bytes: Size of the file.
    """

    def __init__(self, file_bytes: int) -> None:
        self.file_bytes, self.steps, self.tensor_bytes = file_bytes, 0, 0
        self._max_tensor_bytes = MAX_TENSOR_EXPANSION * file_bytes + SMALL_FILE_BYTES

    def charge(self, steps: int) -> None:
        """Count steps."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise LimitError(f"too many objects (the limit is {MAX_STEPS:,} steps to read them)")

    def charge_tensor(self, tensor: torch.Tensor) -> None:
        """Count the bytes of a tensor, as if it were contiguous."""
        self.tensor_bytes += volume(tensor.shape) * tensor.element_size()
        check_limit(self.tensor_bytes, self._max_tensor_bytes, "too many bytes of tensors for its size")


_PLAIN = {str, bytes, int, float, bool, type(None)}
_WITHOUT_PARTS = (torch.Tensor, Enum, FunctionType, MethodType, type)
_OPEN = (0, 0)


def check_structure(found: Any) -> None:
    """Check the nesting and the sharing of the object in a file, without recursion.

    Args:
        found: The object.

    Raises:
        LimitError: It is nested too deeply, contains itself, or its `repr` would be too long.
    """
    known: dict[int, tuple[int, int]] = {}  # id → unrolled size and depth, or `_OPEN` until its parts are known
    stack: list[tuple[Any, list[Any] | None]] = [(found, None)]
    while stack:
        thing, parts = stack.pop()
        if parts is None and id(thing) not in known:
            parts = _parts(thing)
            known[id(thing)] = _OPEN
            stack.append((thing, parts))
            stack.extend((part, None) for part in parts if type(part) not in _PLAIN)
        elif parts is not None:
            counts = [known.get(id(part)) or (1 + length(part), 1) for part in parts]
            size, depth = 1 + sum(count[0] for count in counts), 1 + max((count[1] for count in counts), default=0)
            check_limit(size, MAX_UNROLLED, "too many repetitions of shared objects")
            check_limit(depth, MAX_DEPTH, "too many levels of nested objects")
            known[id(thing)] = size, depth
        elif known[id(thing)] == _OPEN:
            raise LimitError("an object that contains itself")


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return [*thing.keys(), *thing.values(), *getattr(thing, "__dict__", {}).values()]
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    return [] if isinstance(thing, _WITHOUT_PARTS) else list(getattr(thing, "__dict__", {}).values())
