"""A strict reader of zip archives, which has one meaning for each file or refuses it.

Two readers of the zip format can see different records in one crafted file: it has a second directory, sizes that
disagree, or records that overlap. So the sizes of records, and their bytes, both come from this reader. It accepts the
form that `torch.save` and `zip` write: records, one directory, end of file, with nothing in between that counts.

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile

from yolov12.models.limits import MAX_DIRECTORY_BYTES, MAX_INFLATION, MAX_RECORDS, check_limit

__all__ = ["Archive"]

_LOCAL = struct.Struct("<4s5H3L2H")  # header in front of a record
_ENTRY = struct.Struct("<4s6H3L5H2L")  # entry of the directory
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")  # between _END64 and _END
_IN_ZIP64 = 0xFFFFFFFF  # replaces a value that needs 64 bits
_ENCRYPTED, _SIZES_FOLLOW = 1, 8  # flags


class _Record(NamedTuple):
    header: int  # offset in the file
    start: int  # offset of its bytes
    packed: int  # number of bytes in the file
    size: int
    method: int


class Archive:
    """Records of an archive. Their names leave out the folder that `torch.save` puts them in.

    Args:
        file: An open file, of which this object changes the position.

    Raises:
        BadZipFile: The archive is incomplete, or has more than one meaning.
        LimitError: It has too many records, or records that inflate too much.
        struct.error: It is incomplete.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        start, length, count = self._directory()
        check_limit(count, MAX_RECORDS, "too many records")
        check_limit(length, MAX_DIRECTORY_BYTES, "too many bytes in its directory")
        records = self._records(self._read_at(start, length), count)
        self._check_places(records.values(), start)
        root = next(iter(records), b"").partition(b"/")[0] + b"/"
        self._by_name = {name[len(root) :]: record for name, record in records.items() if name.startswith(root)}

    def __contains__(self, name: str) -> bool:
        return name.encode() in self._by_name

    def size(self, name: str) -> int:
        """Return the number of bytes of a record.

        Raises:
            BadZipFile: There is no such record.
        """
        return self._record(name).size

    def read(self, name: str) -> bytes:
        """Return the bytes of a record.

        Raises:
            BadZipFile: There is no such record, or it is incomplete.
        """
        buffer = bytearray(self.size(name))
        self.read_into(name, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of a record of the same size.

        Checksums are not compared: PyTorch does not compare them, and newer versions can leave them out.

        Raises:
            BadZipFile: There is no such record, it is incomplete, or it has another size.
        """
        record = self._record(name)
        _require(len(buffer) == record.size, f"record {name!r:.60} has another size")
        if record.method == ZIP_STORED:
            self._file.seek(record.start)
            is_whole = self._file.readinto(buffer) == record.size  # type: ignore[attr-defined]
        else:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            data = inflate.decompress(self._read_at(record.start, record.packed), record.size + 1)
            if is_whole := len(data) == record.size and inflate.eof:
                buffer[:] = data
        _require(is_whole, f"record {name!r:.60} is incomplete")

    def _record(self, name: str) -> _Record:
        _require(name in self, f"there is no record {name!r:.60}")
        return self._by_name[name.encode()]

    def _read_at(self, offset: int, count: int) -> bytes:
        _require(0 <= offset <= offset + count <= self._size, "something is outside the file")
        self._file.seek(offset)
        return self._file.read(count)

    def _directory(self) -> tuple[int, int, int]:
        """Return offset, size and number of entries of the directory, which ends where the end records begin."""
        end = self._size - _END.size
        magic, _, _, _, *narrows, comment = _END.unpack(self._read_at(end, _END.size))
        _require(magic == b"PK\5\6" and comment == 0, "the end of the archive is missing")
        count, length, start = narrows
        locator = end - _LOCATOR.size
        if locator >= _END64.size and self._read_at(locator, 4) == b"PK\6\7":
            end = locator - _END64.size
            _require(_LOCATOR.unpack(self._read_at(locator, _LOCATOR.size))[2] == end, "ZIP64 ends elsewhere")
            magic, *_, count, length, start = _END64.unpack(self._read_at(end, _END64.size))
            pairs = zip((count, length, start), narrows, (0xFFFF, _IN_ZIP64, _IN_ZIP64), strict=True)
            _require(magic == b"PK\6\6" and all(n in (wide, unknown) for wide, n, unknown in pairs), "ZIP64 disagrees")
        _require(start + length == end, "something is between the directory and the end of the archive")
        return start, length, count

    def _records(self, directory: bytes, count: int) -> dict[bytes, _Record]:
        records: dict[bytes, _Record] = {}
        names_seen: set[bytes] = set()
        at = 0
        for _ in range(count):
            magic, _, _, flags, method, *_, packed, size, names, extras, comments, _, _, _, header = _ENTRY.unpack_from(
                directory, at
            )
            at += _ENTRY.size
            name, extra = directory[at : at + names], directory[at + names : at + names + extras]
            at += names + extras + comments
            _require(magic == b"PK\1\2" and at <= len(directory), "the directory is damaged")
            _require(name.lower() not in names_seen, f"two records have the same name {name!r:.60}")
            names_seen.add(name.lower())  # PyTorch's reader does not tell upper from lower case
            _require(not flags & _ENCRYPTED and method in (ZIP_STORED, ZIP_DEFLATED), "a record is encrypted or packed")
            size, packed, header = _wide((size, packed, header), extra)
            _require(method == ZIP_DEFLATED or packed == size, f"record {name!r:.60} has two sizes")
            records[name] = self._located(name, _Record(header, 0, packed, size, method))
        _require(at == len(directory), "the directory is damaged")
        return records

    def _located(self, name: bytes, record: _Record) -> _Record:
        """Return a record with the place of its bytes, after checking that its header agrees with the directory."""
        header = self._read_at(record.header, _LOCAL.size + len(name))
        magic, _, flags, method, _, _, _, packed, size, names, extras = _LOCAL.unpack_from(header)
        _require(
            magic == b"PK\3\4" and header[_LOCAL.size :] == name and names == len(name) and method == record.method,
            f"record {name!r:.60} and its entry disagree",
        )
        unknown = (0, _IN_ZIP64) if flags & _SIZES_FOLLOW else (_IN_ZIP64,)
        _require(
            size in (record.size, *unknown) and packed in (record.packed, *unknown),
            f"record {name!r:.60} has two sizes",
        )
        return record._replace(start=record.header + _LOCAL.size + names + extras)

    def _check_places(self, records: Iterable[_Record], directory: int) -> None:
        """Check that records do not overlap, lie before the directory, and do not inflate too much."""
        end = 0
        for record in sorted(records):
            _require(end <= record.header, "two records overlap")
            end = record.start + record.packed
        _require(end <= directory, "a record is outside the file")
        total = sum(record.size for record in records)
        check_limit(total, MAX_INFLATION * self._size, "too many bytes in its inflated records")


def _wide(values: tuple[int, ...], extra: bytes) -> list[int]:
    """Replace the values that need 64 bits by those of the ZIP64 field, which holds them in this order."""
    wide = b""
    while len(extra) >= 4 and not wide:
        kind, size = struct.unpack_from("<2H", extra)
        wide, extra = extra[4 : 4 + size] if kind == 1 else b"", extra[4 + size :]
    found = []
    for value in values:
        if value == _IN_ZIP64:
            (value,), wide = struct.unpack_from("<Q", wide), wide[8:]
        found.append(value)
    return found


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BadZipFile(what)
