import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder. Names are looked up there, and hostile files write there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YOLOV12_TRUST_WEIGHTS", raising=False)


@pytest.fixture
def write_zip() -> Callable[..., Path]:
    """Write an archive like `torch.save`: one pickle, given without protocol and stop opcode, and more records."""

    def write(path: Path, body: bytes, **records: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + body + b".")
            archive.writestr("a/byteorder", b"little")
            archive.writestr("a/version", b"3\n")
            for record, content in records.items():
                archive.writestr(f"a/{record.replace('_', '/')}", content)
        return path

    return write


@pytest.fixture(scope="module")
def reader(start_script: Callable[..., Any]) -> Any:
    """A process that reads files, each in a process of its own with little memory and time."""
    return start_script(Path(__file__).parent / "limited.py", "paths")


@pytest.fixture
def read_limited(reader: Any) -> Callable[[Path], str]:
    """Read a file with little memory and time; return the error, or the type of the object and the size of its repr."""

    def read(path: Path) -> str:
        print(path.resolve(), file=reader.stdin, flush=True)
        return str(json.loads(reader.stdout.readline()))

    return read
