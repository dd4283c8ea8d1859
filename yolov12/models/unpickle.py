"""A replacement for the `pickle` module that runs no code named by the file it reads.

It is used as `torch.load(..., pickle_module=RestrictedPickle())`. Each of four rules closes one attack:

1. A name in the file becomes a *token*, never the class or function itself. The loaded object can therefore not contain
   a callable that the file chose.
2. REDUCE calls only the functions in `CALLS`, which check their arguments.
3. NEWOBJ creates layers, losses and assigners without calling `__init__`. BUILD sets attributes of objects that the
   file created, never of a class, a function or a module.
4. Everything else is listed and replaced by a placeholder. Reading continues, so the error lists all of it. Nothing is
   imported because a file names it.

Ultralytics' restricted loading (`ultralytics.nn.tasks._SafeLoad`) needs torch 2.6. This module works from torch 2.3 on.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from yolov12.models.allow_list import CALLS, RENAMED, RefusedCall, Token, allowed_class, describe, numpy_state

__all__ = ["RestrictedPickle"]


class _Placeholder:
    """Replaces an object that was refused."""


class RestrictedPickle:
    """The `pickle_module` argument of `torch.load`, for reading one file.

    `refused` lists what the file asked for and did not get. If it is not empty, the result must not be used.

    Args:
        record_bytes: Name → bytes of each record of the zip archive. None for the older format without archive.
    """

    def __init__(self, record_bytes: Mapping[str, int] | None = None) -> None:
        self.__name__ = __name__  # torch.load compares it with "dill"
        self.refused: list[str] = []
        self.Unpickler = type("Unpickler", (_Unpickler,), {"refused": self.refused, "record_bytes": record_bytes})

    def load(self, file: Any, **kwargs: Any) -> Any:
        """Read one pickle. The arguments are those of `pickle.load`."""
        return self.Unpickler(file, **kwargs).load()


class _Unpickler(pickle._Unpickler):  # the Python implementation, whose opcodes can be replaced
    refused: list[str]
    record_bytes: Mapping[str, int] | None
    stack: list[Any]
    append: Callable[[Any], None]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def refuse(self, what: str) -> _Placeholder:
        what = ascii(what)[1:-1][:120]  # escapes control characters, which the file chose
        if what not in self.refused:
            self.refused.append(what)
        return _Placeholder()

    def refuse_call(self, function: Any) -> _Placeholder:
        if isinstance(function, _Placeholder) or (isinstance(function, Token) and function.refused):
            return _Placeholder()  # it is already listed
        return self.refuse(f"a call of {describe(function)}")

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        full = RENAMED.get(full, full)
        if full.startswith("ultralytics.yolo.utils."):  # their place in early releases
            full = full.replace(".yolo", "", 1)
        if full.startswith("torch.") and isinstance(dtype := vars(torch).get(full[6:]), torch.dtype):
            return dtype
        token = Token(full, call=CALLS.get(full), cls=None if full in CALLS else allowed_class(full))
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
        try:
            self.append(function.call(*args))
        except RefusedCall as e:
            self.append(self.refuse(str(e)))
        except Exception:
            if not self.refused:
                raise
            self.append(_Placeholder())  # an argument was refused; read on to list the rest

    def load_newobj(self) -> None:
        args, token = self.stack.pop(), self.stack.pop()
        makes = isinstance(token, Token) and token.cls is not None and args == ()
        self.append(object.__new__(token.cls) if makes else self.refuse_call(token))

    def load_newobj_ex(self) -> None:
        self.stack[-3:] = [self.refuse_call(self.stack[-3])]

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        kind: Any = type(target)
        if isinstance(target, _Placeholder) or isinstance(state, _Placeholder) or numpy_state(target, state):
            return
        if type(state) is not dict or not all(type(key) is str and not key.startswith("__") for key in state):
            self.refuse(f"setting the state of {describe(target)}")
        elif held := [value.name for value in state.values() if isinstance(value, Token) and not value.refused]:
            self.refuse(f"{held[0]} as an attribute")
        elif issubclass(kind, nn.Module):
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
        elif pid[0] == "module":  # the older format: a class with its source, which torch compares
            self.append(pid[1])
        else:
            self.check_size(*pid[1:5])
            self.append(self.persistent_load(pid))

    def check_size(self, storage_type: Any, key: Any, location: Any, numel: Any) -> None:
        # torch does not check `numel` and would read past the end of a shorter record.
        if type(key) is not str or type(numel) is not int:
            raise pickle.UnpicklingError("a tensor without a record")
        announced = numel * storage_type.dtype.itemsize
        if self.record_bytes is not None and self.record_bytes.get(f"data/{key}", 0) != announced:
            raise pickle.UnpicklingError(f"tensor record {key!r} has another size than announced")

    def load_append(self) -> None:
        self.extend([self.stack.pop()])

    def load_appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
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
            target.update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, _Placeholder):
            self.refuse(f"adding items to {describe(target)}")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.PERSID[0]: load_persid,
        pickle.BINPERSID[0]: load_binpersid,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
