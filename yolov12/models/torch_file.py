"""Reads what `torch.save` wrote, in its zip archive or in the older format, without running code of the file.

`unpickle` makes the object, `storages` its tensors, and `archive` finds their bytes. `torch.load` has no part in it.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, BinaryIO

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from yolov12.errors import UnreadableWeightsError
from yolov12.models.archive import Archive
from yolov12.models.limits import MAX_PICKLE_BYTES, Budget, check_limit, check_structure
from yolov12.models.storages import ArchiveStorages, LegacyStorages
from yolov12.models.unpickle import unpickle

__all__ = ["load"]


def load(file: BinaryIO, refused: list[str]) -> Any:
    """Read the object in a file, with tensors on the CPU.

    Args:
        file: A file, open at its start.
        refused: Gets what the file asked for and did not get. If it is not empty, the result must not be used.

    Raises:
        UnreadableWeightsError: The file has a format of PyTorch that is no checkpoint.
        LimitError: It goes over a limit.
        Exception: Any other error. The file is incomplete, or was not written by `torch.save`.
    """
    budget = Budget(os.fstat(file.fileno()).st_size)
    start = file.read(265)
    if start[257:262] == b"ustar":
        raise UnreadableWeightsError(
            f"{file.name} has the tar format that PyTorch wrote before 2017. Load it with a PyTorch of that time, and "
            "save it again."
        )
    if start[:4] == b"PK\x03\x04":
        found = _load_archive(Archive(file), file.name, refused, budget)
    elif start[:1] == pickle.PROTO:
        found = _load_legacy(file, refused, budget)
    else:
        raise pickle.UnpicklingError("no torch.save file")
    if not refused:
        check_structure(found)
    return found


def _load_archive(archive: Archive, name: str, refused: list[str], budget: Budget) -> Any:
    if "constants.pkl" in archive:
        raise UnreadableWeightsError(
            f"{name} is a TorchScript archive, which is a program. Load the .pt file that it was exported from, or "
            "rename it to .torchscript to run it as an exported model."
        )
    check_limit(archive.size("data.pkl"), MAX_PICKLE_BYTES, "too many bytes in its pickle")
    stream = io.BytesIO(archive.read("data.pkl"))
    return unpickle(stream, ArchiveStorages(archive).get, refused, budget)


def _load_legacy(file: BinaryIO, refused: list[str], budget: Budget) -> Any:
    """Read five pickles: two numbers, facts about the system, the object, and the keys of the storages that follow."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))  # the pickles; a longer one is cut off, which is an error
    storages = LegacyStorages(budget.file_bytes)

    def unpickled() -> Any:
        return unpickle(stream, storages.get, refused, budget)

    numbers = unpickled(), unpickled()
    if [type(number) for number in numbers] != [int, int] or numbers != (MAGIC_NUMBER, PROTOCOL_VERSION):
        raise pickle.UnpicklingError("no torch.save file")
    unpickled()  # the byte order is always little, whatever the system was
    found, keys = unpickled(), unpickled()
    file.seek(stream.tell())
    storages.fill(file, keys)
    return found
