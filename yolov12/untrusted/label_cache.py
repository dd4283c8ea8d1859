"""Reads the `*.cache` files of data sets without running what is in them, and writes them in one step.

Ultralytics stores the labels that it found as a pickle. A data set may bring such a file along, and a pickle can call
any function. The reader here makes plain data and NumPy arrays of numbers, in the format that Ultralytics writes. It
refuses every other name, and Ultralytics then reads the labels anew, as it does for a cache that is out of date.

Several processes may read and write one cache at the same time.
"""

from __future__ import annotations

import gc
import glob
import pickle
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from yolov12.printable import printable
from yolov12.untrusted import TRUST_DATA, is_set

__all__ = ["load_dataset_cache_file", "save_dataset_cache_file"]

_LEFT_S = 3600.0  # seconds after which an unfinished file is that of a process that was killed
_NUMBERS = re.compile(r"[biufc]\d{1,2}")  # data types of arrays: the same codes as in `np.dtype("f4")`


def load_dataset_cache_file(stock: Callable[..., Any], /, path: Any) -> dict[str, Any]:
    """Read a `*.cache` file in place of Ultralytics' `load_dataset_cache_file`.

    Args:
        stock: Ultralytics' own function, used with YOLOV12_TRUST_DATA=1.
        path: The file.

    Returns:
        The labels that Ultralytics found, and what they were found in.

    Raises:
        pickle.UnpicklingError: The file holds something else than plain data and arrays of numbers. Ultralytics reads
            the labels anew after any error.
        OSError: The file cannot be opened.
    """
    if is_set(TRUST_DATA):
        return stock(path)  # type: ignore[no-any-return]
    was_enabled = gc.isenabled()
    gc.disable()  # as Ultralytics does: it would look through all labels again and again, and free nothing
    try:
        return _read(Path(path))
    except pickle.UnpicklingError as error:
        from ultralytics.utils import LOGGER

        LOGGER.warning(f"{path} {error}. Nothing in it was run; the labels are read anew")
        raise
    finally:
        if was_enabled:
            gc.enable()


def save_dataset_cache_file(
    _: Callable[..., None], /, prefix: str, path: Path, x: dict[str, Any], version: str
) -> None:
    """Write a `*.cache` file in place of Ultralytics' `save_dataset_cache_file`.

    Ultralytics deletes the previous file first, which fails if another process has just done so, and then writes to
    the file that other processes may be reading.

    Args:
        _: Ultralytics' own function.
        prefix: Beginning of a log line.
        path: The file.
        x: The labels that Ultralytics found, and what they were found in. It gets the version.
        version: Version of Ultralytics' format.
    """
    from ultralytics.utils import LOGGER

    x["version"] = version
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # no other process writes to it
    try:
        for left in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 32}"):
            if time.time() - left.stat().st_mtime > _LEFT_S:
                left.unlink(missing_ok=True)
        with unfinished.open("xb") as file:
            np.save(file, x)  # type: ignore[arg-type]  # as an array of one object
        unfinished.replace(path)
        LOGGER.info(f"{prefix}New cache created: {path}")
    except Exception as error:  # the folder is read-only, or the disk full: the labels are read again the next time
        LOGGER.warning(f"{prefix}{path} could not be written, {error}")
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        numpy_format: Any = np.lib.format
        if numpy_format.read_magic(file) != (1, 0):
            raise ValueError("another version than the one that numpy.save writes for this")
        numpy_format.read_array_header_1_0(file)
        found = _Unpickler(file).load()  # an array without dimensions, which holds the dictionary
    if not isinstance(found, _Array) or not isinstance(found.value, dict):
        raise pickle.UnpicklingError("holds no dictionary")
    _put_arrays_into(found.value)
    return found.value


def _put_arrays_into(cache: dict[str, Any]) -> None:
    """Replace every `_Array` in dictionaries and lists by its NumPy array."""
    waiting: list[Any] = [cache]
    seen = {id(cache)}  # not recursive, and once for each: a file may nest and share at will
    while waiting:
        container = waiting.pop()
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if isinstance(value, _Array):
                if isinstance(container, tuple) or not isinstance(value.value, np.ndarray):
                    raise pickle.UnpicklingError("holds an array in an unusual place")
                container[key] = value.value
            elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
            elif isinstance(value, (type, _DType)):
                raise pickle.UnpicklingError("holds a type")


class _Unpickler(pickle.Unpickler):
    """Pickle reader to which a file can name nothing but the parts of a NumPy array.

    For these it gets classes of this module. Each has a `__setstate__`, so that the file cannot set an attribute.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"asks for {printable(f'{module}.{name}'):.120}, which no label needs")
        return found


class _DType:
    """Data type of an array. Its state in the file is ignored: NumPy's data types are shared by the whole process."""

    __slots__ = ("code",)
    __hash__ = None  # type: ignore[assignment]  # no key of a dictionary

    def __init__(self, code: Any, *_: Any) -> None:
        if type(code) is not str or not (code == "O8" or _NUMBERS.fullmatch(code)):
            raise pickle.UnpicklingError("holds an array of something else than numbers")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or state[1] not in ("<", "|", "="):
            raise pickle.UnpicklingError("holds an array with the bytes in another order")


class _Array:
    """An array. `value` is a NumPy array of numbers or, for an array of one object without dimensions, that object."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]  # no key of a dictionary
    value: Any

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        if isinstance(dtype, _DType) and dtype.code == "O8" and shape == () and type(data) is list:
            self.value = data[0]
        elif isinstance(dtype, _DType) and dtype.code != "O8" and type(data) is bytes:
            # NumPy checks that the bytes suffice for the shape. The copy can be written to.
            self.value = np.ndarray(shape, dtype.code, data, order="F" if is_fortran else "C").copy("K")
        else:
            raise pickle.UnpicklingError("holds an array of something else than numbers")


class _Scalar:
    """A NumPy number, which takes the place of the instance."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, _DType) or dtype.code == "O8" or type(data) is not bytes:
            raise pickle.UnpicklingError("holds an unusual number")
        return np.frombuffer(data, dtype.code, count=1)[0]

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("changes a number")


_KNOWN: dict[str, type] = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
}
