from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

CODE = "__import__('pathlib').Path('CANARY').touch()"  # tests run in a temporary folder


class Evil:
    """Pickles to a call that leaves a file behind."""

    def __reduce__(self) -> Any:
        return eval, (CODE,)


@pytest.fixture
def evil() -> Evil:
    return Evil()


@pytest.fixture
def canary() -> Path:
    """File that hostile code makes."""
    return Path("CANARY")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in its own folder, and trust nothing."""
    monkeypatch.chdir(tmp_path)
    for kind in ("WEIGHTS", "DATA"):
        monkeypatch.delenv(f"YOLOV12_TRUST_{kind}", raising=False)


@pytest.fixture
def make_data_set() -> Callable[..., Path]:
    """Write a data set of two images: `make(folder, label)` returns its folder."""

    def make(folder: str | Path = "set", label: str = "0 0.5 0.5 0.5 0.5\n") -> Path:
        folder = Path(folder)
        for split in ("train", "val"):
            (folder / "images" / split).mkdir(parents=True)
            (folder / "labels" / split).mkdir(parents=True)
            cv2.imwrite(str(folder / "images" / split / "a.png"), np.zeros((32, 32, 3), np.uint8))
            (folder / "labels" / split / "a.txt").write_text(label)
        return folder

    return make
