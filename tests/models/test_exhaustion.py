"""Small files that would use much memory or time are refused, with little of both."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from yolov12.models.limits import MAX_DEPTH, MAX_REFUSED


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def layer(name: str, state: bytes) -> bytes:
    return f"c{name}\n".encode() + b")\x81}(" + state + b"ub"


DOUBLED = b")q\0" + b"".join(
    b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100)
)  # each tuple holds the last one twice
MANY = 200_000
PAIRS = b"(" + b"".join(text(f"{i:05}") + b"N" for i in range(20_000))

BOMBS = {
    "nested": (b"]" + b"\x85" * 100_000, "too many levels"),
    "exploding repr": (DOUBLED, "too many repetitions"),
    "exploding key": (b"}" + DOUBLED + b"Ns", "nested"),
    "exploding member": (b"\x8f(" + DOUBLED + b"\x90", "nested"),
    "exploding frozenset": (b"(" + DOUBLED + b"\x91", "nested"),
    "exploding set": (b"cbuiltins\nset\n]" + DOUBLED + b"a\x85R", "set with unusual arguments"),
    "exploding enum": (
        b"ctorchvision.transforms.functional\nInterpolationMode\n" + DOUBLED + b"\x85R",
        "InterpolationMode with unusual arguments",
    ),
    "exploding layers": (
        layer("torch.nn.modules.linear\nIdentity", text("a") + b"N")
        + b"q\0"
        + b"".join(
            layer(
                "torch.nn.modules.linear\nIdentity",
                text("_modules") + b"}(" + b"".join(text(n) + b"h" + bytes([i]) for n in "ab") + b"u",
            )
            + b"q"
            + bytes([i + 1])
            for i in range(40)
        ),
        "too many repetitions",
    ),
    "long text again and again": (text("x" * 6_000) + b"q\0](" + b"h\0" * 100_000 + b"e", "too many repetitions"),
    "itself": (b"]q\0h\0a", "contains itself"),
    "items": (b"](" + b"\x8f" * 1_500_000 + b"e", "too many objects"),
    "copied text": (
        text("x" * 60_000) + b"q\0c_codecs\nencode\nq\1" + text("latin1") + b"q\2](" + b"h\1h\0h\2\x86R" * MANY + b"e",
        "too many objects",
    ),
    "copied pairs": (
        b"]("
        + b"".join(text(f"{i:05}") + b"N\x86" for i in range(20_000))
        + b"eq\0ccollections\nOrderedDict\nq\1]("
        + b"h\1h\0\x85R" * MANY
        + b"e",
        "too many objects",
    ),
    "copied state": (
        b"}" + PAIRS + b"uq\0ctorch.nn.modules.linear\nIdentity\nq\1](" + b"h\1)\x81h\0b" * MANY + b"e",
        "too many objects",
    ),
    "layers": (b"ctorch.nn.modules.linear\nIdentity\nq\1](" + b"h\1)\x81}b" * MANY + b"e", "too many objects"),
    "names": (b"](" + b"ctorch\nSize\n" * 10_000 + b"e", "too many objects"),
    "path": (text("x" * 1000) + b"q\0cpathlib\nPosixPath\n(" + b"h\0" * 10_000 + b"tR", "Path with unusual arguments"),
    "size": (b"ctorch\nSize\n](" + number(2**31) * 3 + b"e\x85R", "torch.Size with unusual arguments"),
    "negative size": (b"ctorch\nSize\n](" + number(-1) + b"e\x85R", "torch.Size with unusual arguments"),
    "dimensions": (b"ctorch\nSize\n](" + b"K\1" * 1000 + b"e\x85R", "torch.Size with unusual arguments"),
    "reserved bytes": (b"\x96" + struct.pack("<Q", 2**40), "cannot be read"),
    "reserved frame": (b"\x95" + struct.pack("<Q", 2**40), "cannot be read"),
    "long number": (b"L0x" + b"f" * 100_000 + b"L\n", "cannot be read"),
    "LSTM": (
        layer(
            "torch.nn.modules.rnn\nLSTM",
            text("_all_weights") + b"]]K\1aa" + text("num_layers") + number(2**40),
        ),
        "a LSTM with an unusual state",
    ),
    "attention": (
        layer("ultralytics.nn.modules.block\nAAttn", text("head_dim") + b"](NNe" + text("num_heads") + number(2**40)),
        "a AAttn with an unusual state",
    ),
    "array": (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R(K\1K\0"
        + number(2**60)
        + b"\x86cnumpy\ndtype\n"
        + text("f8")
        + b"\x85R\x89C\0tb",
        "setting the state of a ndarray",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_takes_little_memory_and_time(
    kind: str, write_zip: Callable[..., Path], read_limited: Callable[[Path], str]
) -> None:
    body, message = BOMBS[kind]
    assert message in read_limited(write_zip(Path("bomb.pt"), body))


def test_the_limit_on_levels_leaves_room(write_zip: Callable[..., Path], read_limited: Callable[[Path], str]) -> None:
    inside = b"]" + b"\x85" * (MAX_DEPTH - 1)
    assert read_limited(write_zip(Path("deep.pt"), inside)).startswith("tuple")
    assert "too many levels" in read_limited(write_zip(Path("deeper.pt"), inside + b"\x85"))


@pytest.mark.parametrize("name", ["a/data.pkl", "a/data/0"])
def test_a_record_does_not_inflate_a_thousandfold(name: str, read_limited: Callable[[Path], str]) -> None:
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/version", b"3")
        archive.writestr(name + "0" * (name == "a/data.pkl"), b"]" * (64 << 20))
    assert "too many bytes in its inflated records" in read_limited(Path("bomb.pt"))


def test_the_message_names_only_so_many(write_zip: Callable[..., Path], read_limited: Callable[[Path], str]) -> None:
    body = b"".join(f"cposix\nsystem{i}\n".encode() for i in range(1000))
    assert read_limited(write_zip(Path("evil.pt"), body)).count("posix.system") == MAX_REFUSED + 1
