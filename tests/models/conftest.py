import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up in the current folder, and hostile files write there: it is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YOLOV12_TRUST_WEIGHTS", raising=False)


@pytest.fixture
def write_zip() -> Callable[..., Path]:
    """Write what `torch.save` writes: an archive of one pickle, given without its frame, and more records."""

    def write(path: Path, body: bytes, **records: bytes) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + body + b".")
            archive.writestr("a/byteorder", b"little")
            archive.writestr("a/version", b"3\n")
            for record, content in records.items():
                archive.writestr(f"a/{record.replace('_', '/')}", content)
        return path

    return write
