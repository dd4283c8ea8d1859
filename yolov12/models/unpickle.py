"""An unpickler that runs no code named by the file it reads, and does no more work than a checkpoint needs.

Each of five rules closes one attack:

1. A name in the file becomes a *token*, never the class or function itself. The loaded object can therefore not contain
   a callable that the file chose.
2. REDUCE calls only the functions in `CALLS`, which check their arguments.
3. NEWOBJ creates layers, losses and assigners without calling `__init__`. BUILD sets attributes of objects that the
   file created, never of a class, a function or a module.
4. Everything else is listed and replaced by a placeholder. Reading continues, so the error lists all of it. Nothing is
   imported because a file names it.
5. Every opcode counts against a budget, with the items that it copies. Opcodes that only the text protocol uses are not
   known, nor are those that reserve memory before they read. Keys are flat, so hashing them takes little time.

Ultralytics' restricted loading (`ultralytics.nn.tasks._SafeLoad`) needs torch 2.6. This module works from torch 2.3 on.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

import torch
from torch import nn

from yolov12.models.allow_list import (
    CALLS,
    RENAMED,
    STORAGES,
    RefusedCall,
    Token,
    allowed_class,
    check_layer_state,
    describe,
    is_flat,
    numpy_state,
)
from yolov12.models.limits import MAX_REFUSED, MAX_TEXT, Budget, length

__all__ = ["unpickle"]


def unpickle(
    file: BinaryIO,
    storage: Callable[[str, torch.dtype, int], torch.storage.TypedStorage],
    refused: list[str],
    budget: Budget,
) -> Any:
    """Read one pickle.

    Args:
        file: All bytes that may be read, in memory, at the start of the pickle.
        storage: Key, type and number of elements → storage of a tensor.
        refused: Gets what the pickle asks for and does not get. If it is not empty, the result must not be used.
        budget: Counts the work.

    Raises:
        Exception: The pickle is incomplete or unusual. Any type is possible.
    """
    reader = _Unpickler(file, encoding="utf-8")  # of strings that Python 2 wrote, as in `torch.load`
    reader.storage, reader.refused, reader.budget = storage, refused, budget
    return reader.load()


class _Placeholder:
    """Replaces an object that was refused."""


class _Unpickler(pickle._Unpickler):  # the Python implementation, whose opcodes can be replaced
    storage: Callable[[str, torch.dtype, int], torch.storage.TypedStorage]
    refused: list[str]
    budget: Budget
    stack: list[Any]
    append: Callable[[Any], None]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def refuse(self, what: str) -> _Placeholder:
        what = ascii(what)[1:-1][:120]  # escapes control characters, which the file chose
        if what not in self.refused:
            self.refused.append(what)
        if len(self.refused) > MAX_REFUSED:
            raise pickle.UnpicklingError("it asks for too much")
        return _Placeholder()

    def refuse_call(self, function: Any) -> _Placeholder:
        if isinstance(function, _Placeholder) or (isinstance(function, Token) and function.refused):
            return _Placeholder()  # it is already listed
        return self.refuse(f"a call of {describe(function)}")

    def find_class(self, module: str, name: str) -> Any:
        if len(module) + len(name) > MAX_TEXT:
            return self.refuse(f"{module[:MAX_TEXT]}.{name[:MAX_TEXT]}")
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        full = RENAMED.get(full, full)
        if full.startswith(("ultralytics.yolo.utils.", "ultralytics.yolo.data.")):  # their place in early releases
            full = full.replace(".yolo", "", 1)
        if full.startswith("torch.") and isinstance(dtype := vars(torch).get(full[6:]), torch.dtype):
            return dtype
        is_class = full not in CALLS and full not in STORAGES
        token = Token(full, CALLS.get(full), allowed_class(full) if is_class else None, STORAGES.get(full))
        if token.refused:
            self.refuse(full)
        return token

    def get_extension(self, code: int) -> None:
        self.append(self.refuse(f"copyreg extension {code}"))

    def _instantiate(self, klass: Any, args: Any) -> None:  # opcodes INST and OBJ
        self.append(self.refuse_call(klass))

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Token) or function.call is None or type(args) is not tuple:
            self.append(self.refuse_call(function))
            return
        self.budget.charge(sum(length(arg) for arg in args))
        try:
            made = function.call(*args)
            if isinstance(made, torch.Tensor):
                self.budget.charge_tensor(made)
            self.append(made)
        except RefusedCall as e:
            self.append(self.refuse(str(e)))
        except Exception:
            if not self.refused:
                raise
            self.append(_Placeholder())  # an argument was refused; read on to list the rest

    def load_newobj(self) -> None:
        args, token = self.stack.pop(), self.stack.pop()
        makes = isinstance(token, Token) and token.cls is not None and type(args) is tuple and not args
        self.append(object.__new__(token.cls) if makes else self.refuse_call(token))

    def load_newobj_ex(self) -> None:
        self.stack[-3:] = [self.refuse_call(self.stack[-3])]

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        kind: Any = type(target)
        self.budget.charge(length(state) + (sum(map(length, state)) if type(state) is tuple else 0))
        if isinstance(target, _Placeholder) or isinstance(state, _Placeholder) or numpy_state(target, state):
            return
        if type(state) is not dict or not all(type(key) is str and not key.startswith("__") for key in state):
            self.refuse(f"setting the state of {describe(target)}")
        elif held := [value.name for value in state.values() if isinstance(value, Token) and not value.refused]:
            self.refuse(f"{held[0]} as an attribute")
        elif issubclass(kind, nn.Module):
            check_layer_state(target, state)
            kind.__setstate__(target, state)  # not `target.__setstate__`, which may come from the file
        elif kind is OrderedDict or allowed_class(f"{kind.__module__}.{kind.__name__}"):
            vars(target).update(state)
        else:
            self.refuse(f"setting attributes of {describe(target)}")

    def load_persid(self) -> None:
        self.readline()
        self.append(self.refuse("a persistent id"))

    def load_binpersid(self) -> None:
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) < 4 or pid[0] not in ("storage", "module"):
            self.append(self.refuse("a persistent id"))
        elif pid[0] == "module":  # the older format: a class with its source, which nobody needs
            self.append(pid[1])
        else:
            self.append(self.find_storage(*pid[1:]))

    def find_storage(self, kind: Any, key: Any, location: Any, elements: Any, view: Any = None) -> Any:
        if not isinstance(kind, Token) or kind.dtype is None:
            return self.refuse_call(kind)
        if type(key) is not str or type(elements) is not int or view is not None:
            raise pickle.UnpicklingError("a tensor without a record")
        return self.storage(key, kind.dtype, elements)

    def load_append(self) -> None:
        self.extend([self.stack.pop()])

    def load_appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            self.check_keys(items)
            target.update(items)
        elif not isinstance(target, _Placeholder):
            self.refuse(f"adding items to {describe(target)}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def load_setitems(self) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) in (dict, OrderedDict):
            self.check_keys(items[::2])
            target.update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, _Placeholder):
            self.refuse(f"adding items to {describe(target)}")

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    @staticmethod
    def check_keys(keys: list[Any]) -> None:
        if not all(map(is_flat, keys)):  # the time to hash them may be exponential in the size of the file
            raise pickle.UnpicklingError("a key or a member of a set is nested")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}
    """Opcode → function that runs it."""


_PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET
    GLOBAL STACK_GLOBAL INST OBJ EXT1 EXT2 EXT4
"""
"""Opcodes that run as in Python. Those of the last line end in `find_class`, `_instantiate` and `get_extension`."""

_REPLACED: dict[str, Any] = {
    "REDUCE": _Unpickler.load_reduce,
    "NEWOBJ": _Unpickler.load_newobj,
    "NEWOBJ_EX": _Unpickler.load_newobj_ex,
    "BUILD": _Unpickler.load_build,
    "PERSID": _Unpickler.load_persid,
    "BINPERSID": _Unpickler.load_binpersid,
    "APPEND": _Unpickler.load_append,
    "APPENDS": _Unpickler.load_appends,
    "ADDITEMS": _Unpickler.load_appends,
    "SETITEM": _Unpickler.load_setitem,
    "SETITEMS": _Unpickler.load_setitems,
    "FROZENSET": _Unpickler.load_frozenset,
}

_STEPS = {"EMPTY_SET": 3, "NEWOBJ": 5, "REDUCE": 5, "BUILD": 50, "GLOBAL": 1000, "STACK_GLOBAL": 1000, "INST": 1000}
"""Opcode → steps that it counts as, if not one: for the size of what it makes, or the time to look up a name."""


def _counted(run: Callable[[Any], None], steps: int) -> Callable[[Any], None]:
    def run_and_count(unpickler: _Unpickler) -> None:
        unpickler.budget.charge(steps)
        run(unpickler)

    return run_and_count


def _opcode(name: str) -> int:
    return int(getattr(pickle, name)[0])


_RUNS: dict[str, Any] = {**{name: pickle._Unpickler.dispatch[_opcode(name)] for name in _PLAIN.split()}, **_REPLACED}
_Unpickler.dispatch = {_opcode(name): _counted(run, _STEPS.get(name, 1)) for name, run in _RUNS.items()}
