from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked up in the current folder, and hostile files write there: it is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("YOLOV12_TRUST_WEIGHTS", raising=False)
