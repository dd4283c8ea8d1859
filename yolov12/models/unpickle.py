"""A stand-in for the `pickle` module that runs no code named by the file it reads.

For `torch.load(..., pickle_module=Restricted())`. Four rules, each closing one way in:

1. A name in the file becomes a *token*, never the class or function itself, so no callable of the file's choosing can
   end up in what is loaded.
2. REDUCE calls nothing but the functions in `CALLS`; each checks its arguments.
3. NEWOBJ makes layers, losses and assigners without calling their `__init__`; BUILD fills what the file itself made,
   never a class, a function or a module.
4. Everything else is written down and an inert object takes its place: reading goes on, so the refusal can name all
   of it. Nothing is imported because a file names it.

Ultralytics' own restricted loading (`ultralytics.nn.tasks._SafeLoad`) needs torch 2.6; this works from 2.3.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from yolov12.models.allowed import CALLS, RENAMED, Refusal, Token, known_class, named, numpy_state

__all__ = ["Restricted"]


class _Inert:
    """Takes the place of what was refused."""


class Restricted:
    """What `torch.load` takes from a pickle module, for reading one file.

    `refused` lists what the file asked for and did not get. If it is not empty, the result must not be used.
    """

    def __init__(self, record_bytes: Mapping[str, int] | None = None) -> None:
        """`record_bytes`: size of each record of the zip archive, by name; None for the older, unzipped format."""
        self.__name__ = __name__  # torch.load compares it with "dill"
        self.refused: list[str] = []
        self.Unpickler = type("Unpickler", (_Unpickler,), {"refused": self.refused, "record_bytes": record_bytes})

    def load(self, file: Any, **kwargs: Any) -> Any:
        """Read one pickle, as `pickle.load`."""
        return self.Unpickler(file, **kwargs).load()


class _Unpickler(pickle._Unpickler):  # the one written in Python: its opcodes can be replaced
    refused: list[str]
    record_bytes: Mapping[str, int] | None
    stack: list[Any]
    append: Callable[[Any], None]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def refuse(self, what: str) -> _Inert:
        what = ascii(what)[1:-1][:120]  # the file chose these characters: none may reach a terminal as it is
        if what not in self.refused:
            self.refused.append(what)
        return _Inert()

    def refuse_call(self, function: Any) -> _Inert:
        if isinstance(function, _Inert) or (isinstance(function, Token) and function.refused):
            return _Inert()  # it is listed already
        return self.refuse(f"a call of {named(function)}")

    def find_class(self, module: str, name: str) -> Any:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        full = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        full = RENAMED.get(full, full)
        if full.startswith("ultralytics.yolo.utils."):  # where early releases kept them
            full = full.replace(".yolo", "", 1)
        if full.startswith("torch.") and isinstance(dtype := vars(torch).get(full[6:]), torch.dtype):
            return dtype
        token = Token(full, call=CALLS.get(full), cls=None if full in CALLS else known_class(full))
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
        except Refusal as e:
            self.append(self.refuse(str(e)))
        except Exception:
            if not self.refused:
                raise
            self.append(_Inert())  # an argument had been refused; read on for what else there is

    def load_newobj(self) -> None:
        args, token = self.stack.pop(), self.stack.pop()
        makes = isinstance(token, Token) and token.cls is not None and args == ()
        self.append(object.__new__(token.cls) if makes else self.refuse_call(token))

    def load_newobj_ex(self) -> None:
        self.stack[-3:] = [self.refuse_call(self.stack[-3])]

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        kind: Any = type(target)
        if isinstance(target, _Inert) or isinstance(state, _Inert) or numpy_state(target, state):
            return
        if type(state) is not dict or not all(type(key) is str and not key.startswith("__") for key in state):
            self.refuse(f"setting the state of {named(target)}")
        elif held := [value.name for value in state.values() if isinstance(value, Token) and not value.refused]:
            self.refuse(f"{held[0]} as an attribute")
        elif issubclass(kind, nn.Module):
            kind.__setstate__(target, state)  # from the class: one in the instance would be the file's
        elif kind is OrderedDict or known_class(f"{kind.__module__}.{kind.__name__}"):
            vars(target).update(state)
        else:
            self.refuse(f"setting attributes of {named(target)}")

    def load_persid(self) -> None:
        self.readline()
        self.append(self.refuse("a persistent id"))

    def load_binpersid(self) -> None:
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) < 4 or pid[0] not in ("storage", "module"):
            self.append(self.refuse("a persistent id"))
        elif pid[0] == "module":  # the older format names a class so, with its source, which torch would compare
            self.append(pid[1])
        else:
            self.check_size(*pid[1:5])
            self.append(self.persistent_load(pid))

    def check_size(self, storage_type: Any, key: Any, location: Any, numel: Any) -> None:
        # torch believes `numel` and would read past the end of a shorter record.
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
        elif not isinstance(target, _Inert):
            self.refuse(f"adding items to {named(target)}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def load_setitems(self) -> None:
        self.update(self.pop_mark())

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) in (dict, OrderedDict):
            target.update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, _Inert):
            self.refuse(f"adding items to {named(target)}")

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
