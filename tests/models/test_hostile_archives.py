"""Crafted files that make one reader see other records than another: no tensor holds memory that its file does not."""

from __future__ import annotations

import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

ELEMENTS = 4096


def storage(elements: int = ELEMENTS, kind: bytes = b"FloatStorage", view: bytes = b"") -> bytes:
    count = b"\x8a\x08" + struct.pack("<q", elements)
    return b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + count + view + b"tQ"


def tensor(size: int = ELEMENTS, stride: int = 1, offset: int = 0, held: bytes = b"") -> bytes:
    numbers = [b"\x8a\x08" + struct.pack("<q", number) for number in (offset, size, stride)]
    rest = numbers[0] + numbers[1] + b"\x85" + numbers[2] + b"\x85\x89}tR"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + (held or storage()) + rest


def records(body: bytes, data: bytes) -> dict[str, bytes]:
    return {"a/data.pkl": b"\x80\x02" + body + b".", "a/version": b"3\n", "a/data/0": data}


class Craft:
    """Builds an archive piece by piece, as `struct` allows and no library does."""

    def __init__(self, content: Mapping[str, bytes]) -> None:
        self.data, self.places = b"", {}
        for name, body in content.items():
            self.places[name] = (len(self.data), len(body))
            head = struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, len(body), len(body), len(name), 0)
            self.data += head + name.encode() + body

    def directory(self, **size: int) -> tuple[int, int]:
        """Write a directory, in which `data` may have another size, packed size or place; return place and size."""
        start = len(self.data)
        for name, (place, true) in self.places.items():
            changed = size if name.endswith("data/0") else {}
            sizes = changed.get("packed", true), changed.get("size", true)
            head = struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, *sizes, len(name), 0, 0, 0, 0, 0, place)
            self.data += head + name.encode()
        return start, len(self.data) - start

    def end(self, start: int, size: int, comment: int = 0) -> bytes:
        count = len(self.places)
        self.data += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, comment)
        return self.data

    def end64(self, start: int, size: int) -> int:
        self.data += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *[len(self.places)] * 2, size, start)
        return len(self.data) - 56


def two_directories(short: bytes) -> bytes:
    """PyTorch follows the locator to the first directory, and Python reads the second, in which the size fits."""
    craft = Craft(records(tensor(), short))
    first = craft.directory()
    place = craft.end64(*first)
    second = craft.directory(size=4 * ELEMENTS, packed=4 * ELEMENTS)
    craft.end64(*second)
    craft.data += struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    return craft.end(*second)


def zip64_with_other_values(short: bytes) -> bytes:
    craft = Craft(records(tensor(), short))
    first, second = craft.directory(), craft.directory(size=4 * ELEMENTS, packed=4 * ELEMENTS)
    place = craft.end64(*second)
    craft.data += struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    return craft.end(*first)


def two_ends(short: bytes) -> bytes:
    craft = Craft(records(tensor(), short))
    first = craft.directory()
    craft.end(*first, comment=22)
    return craft.end(*first)


def comment(short: bytes) -> bytes:
    craft = Craft(records(tensor(), short))
    return craft.end(*craft.directory(), comment=4) + b"PK\5\6"


def sizes_of(**size: int) -> Callable[[bytes], bytes]:
    def craft(short: bytes) -> bytes:
        archive = Craft(records(tensor(), short))
        return archive.end(*archive.directory(**size))

    return craft


def overlap(short: bytes) -> bytes:
    craft = Craft({**records(tensor(), short), "a/data/1": b"x"})
    place, _ = craft.places["a/data/1"]
    craft.places["a/data/0"] = (craft.places["a/data/0"][0], len(short) + 10)
    assert place
    return craft.end(*craft.directory())


def same_record_twice(short: bytes) -> bytes:
    craft = Craft(records(tensor(), short))
    craft.places["a/DATA/0"] = craft.places["a/data/0"]
    return craft.end(*craft.directory())


def bytes_that_are_cut_off(short: bytes) -> bytes:
    craft = Craft(records(tensor(), short))
    start, size = craft.directory(size=4 * ELEMENTS, packed=4 * ELEMENTS)
    return craft.end(start, size)


@pytest.mark.parametrize(
    ("craft", "message"),
    [
        (two_directories, "ZIP64 ends elsewhere"),
        (zip64_with_other_values, "ZIP64 disagrees"),
        (two_ends, "between the directory and the end"),
        (comment, "the end of the archive is missing"),
        (sizes_of(size=4 * ELEMENTS), "two sizes"),
        (sizes_of(packed=4 * ELEMENTS), "two sizes"),
        (bytes_that_are_cut_off, "two sizes"),
        (overlap, "two sizes"),
        (same_record_twice, "same name"),
    ],
)
def test_an_archive_with_two_meanings_is_refused(
    craft: Callable[[bytes], bytes], message: str, read_limited: Callable[[Path], str]
) -> None:
    Path("crafted.pt").write_bytes(craft(b"\x01" * 16))
    assert message in read_limited(Path("crafted.pt"))


def test_the_same_archive_with_one_meaning_is_read(read_limited: Callable[[Path], str]) -> None:
    craft = Craft(records(tensor(), b"\x01" * 4 * ELEMENTS))
    Path("plain.pt").write_bytes(craft.end(*craft.directory()))
    assert read_limited(Path("plain.pt")).startswith("Tensor")


@pytest.mark.parametrize(("more", "message"), [(0, "Tensor"), (4, "is incomplete"), (-4, "is incomplete")])
def test_a_compressed_record_has_the_size_that_is_announced(
    more: int, message: str, read_limited: Callable[[Path], str]
) -> None:
    size = 4 * ELEMENTS + more
    data = random.Random(0).randbytes(4 * ELEMENTS - 100) + bytes(100)
    with zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records(tensor(1, held=storage(size // 4)), data).items():
            archive.writestr(name, record)
    content = Path("packed.pt").read_bytes()
    Path("packed.pt").write_bytes(content.replace(struct.pack("<L", 4 * ELEMENTS), struct.pack("<L", size)))
    assert message in read_limited(Path("packed.pt"))


def legacy(body: bytes, keys: object, rest: bytes) -> bytes:
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}))
    return head + b"\x80\x02" + body + b"." + pickle.dumps(keys, 2) + rest


FILLED = struct.pack("<q", ELEMENTS) + b"\x01" * 4 * ELEMENTS
OLD = tensor(held=storage(view=b"N"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(OLD, ["0"], FILLED), "Tensor"),
        (legacy(OLD, [], FILLED), "storages without bytes"),
        (legacy(OLD, ["0", "0"], FILLED * 2), "storages without bytes"),
        (legacy(OLD, {"0": 1}, FILLED), "the list of its storages"),
        (legacy(OLD, ["0"], FILLED[:-1]), "cut off"),
        (legacy(OLD, ["0"], struct.pack("<q", 1) + FILLED[8:]), "two sizes"),
        (legacy(tensor(held=storage(2**40, view=b"N")), ["0"], FILLED), "larger than the file"),
        (legacy(tensor(held=storage(view=b"(X\x01\0\0\x001K\0K\1t")), ["0"], FILLED), "without a record"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_file_without_archive_fills_every_storage(
    content: bytes, message: str, read_limited: Callable[[Path], str]
) -> None:
    Path("old.pt").write_bytes(content)
    assert message in read_limited(Path("old.pt"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (tensor(size=ELEMENTS + 1), "larger than its storage"),
        (tensor(offset=1), "larger than its storage"),
        (tensor(stride=2), "larger than its storage"),
        (tensor(size=0, offset=ELEMENTS + 2), "larger than its storage"),
        (tensor(offset=-1), "_rebuild_tensor_v2 with unusual arguments"),
        (tensor(size=-1), "_rebuild_tensor_v2 with unusual arguments"),
        (tensor(stride=-1), "_rebuild_tensor_v2 with unusual arguments"),
        (tensor(size=2**62, stride=2**62), "_rebuild_tensor_v2 with unusual arguments"),
        (tensor(size=2**33, stride=0), "too many bytes of tensors"),
        (tensor(held=storage(-1)), "negative size"),
        (tensor(held=storage(2**62)), "another size"),
        (tensor() + storage(kind=b"IntStorage") + b"\x86", "two sizes or types"),
        (tensor() + storage(8) + b"\x86", "two sizes or types"),
        (storage(kind=b"QInt8Storage"), "asks for torch.QInt8Storage"),
    ],
)
def test_a_tensor_lies_in_its_storage(
    body: bytes, message: str, write_zip: Callable[..., Path], read_limited: Callable[[Path], str]
) -> None:
    assert message in read_limited(write_zip(Path("x.pt"), body, data_0=b"\x01" * 4 * ELEMENTS))
