"""Storages of tensors, filled from a file. Each holds exactly the bytes that the file has for it.

PyTorch checks neither the size of a record against the size of its storage, nor that the older format fills every
storage that it names. A tensor could then show what was in memory before.
"""

from __future__ import annotations

import pickle
import struct
import sys
from typing import Any, BinaryIO

import torch

from yolov12.models.archive import Archive

__all__ = ["ArchiveStorages", "LegacyStorages"]


class _Storages:
    """Storages by their key in the file. Tensors that name the same key share one."""

    def __init__(self) -> None:
        self._found: dict[str, torch.storage.TypedStorage] = {}

    def get(self, key: str, dtype: torch.dtype, elements: int) -> torch.storage.TypedStorage:
        """Return a storage.

        Args:
            key: Key in the file.
            dtype: Type of its elements.
            elements: Number of its elements.

        Raises:
            UnpicklingError: The file does not hold this number of bytes, or names the key with another size or type.
        """
        if key not in self._found:
            _require(elements >= 0, f"storage {key!r:.60} has a negative size")
            storage = self._new(key, dtype, elements * dtype.itemsize)
            self._found[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        found = self._found[key]
        is_same = found.dtype == dtype and found._untyped_storage.nbytes() == elements * dtype.itemsize
        _require(is_same, f"storage {key!r:.60} has two sizes or types")
        return found

    def _new(self, key: str, dtype: torch.dtype, size: int) -> torch.UntypedStorage:
        raise NotImplementedError


class ArchiveStorages(_Storages):
    """Storages in the records of a zip archive.

    Args:
        archive: The archive.
    """

    def __init__(self, archive: Archive) -> None:
        super().__init__()
        self._archive = archive
        order = archive.read("byteorder") if "byteorder" in archive else b"little"
        _require(order in (b"little", b"big"), "the byte order is neither little nor big")
        self._is_swapped = order.decode() != sys.byteorder

    def _new(self, key: str, dtype: torch.dtype, size: int) -> torch.UntypedStorage:
        record = f"data/{key}"
        _require(self._archive.size(record) == size, f"tensor record {key!r:.60} has another size than announced")
        storage = torch.UntypedStorage(size)
        self._archive.read_into(record, _bytes_of(storage))
        if self._is_swapped:
            storage.byteswap(dtype)
        return storage


class LegacyStorages(_Storages):
    """Storages in the format without archive: the pickle names them, and their bytes follow it.

    Args:
        file_bytes: Size of the file, which is the limit of all storages together.
    """

    def __init__(self, file_bytes: int) -> None:
        super().__init__()
        self._left = file_bytes

    def _new(self, key: str, dtype: torch.dtype, size: int) -> torch.UntypedStorage:
        self._left -= size
        _require(self._left >= 0, "its tensors are larger than the file")
        return torch.UntypedStorage(size)

    def fill(self, file: BinaryIO, keys: Any) -> None:
        """Fill all storages with the bytes of the file, from its position on.

        Args:
            file: The file.
            keys: Keys of the storages in the order of their bytes.

        Raises:
            UnpicklingError: The file is too short, or the keys are not those of all storages.
        """
        _require(type(keys) is list and all(type(key) is str for key in keys), "the list of its storages is damaged")
        _require(len(keys) == len(self._found) and set(keys) == self._found.keys(), "storages without bytes")
        for key in keys:
            storage, dtype = self._found[key]._untyped_storage, self._found[key].dtype
            elements = storage.nbytes() // dtype.itemsize
            _require(file.read(8) == struct.pack("<q", elements), f"storage {key!r:.60} has two sizes")
            _require(file.readinto(_bytes_of(storage)) == storage.nbytes(), "it is cut off")  # type: ignore[attr-defined]
            if sys.byteorder == "big":
                storage.byteswap(dtype)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise pickle.UnpicklingError(what)
