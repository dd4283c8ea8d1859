"""Caches of labels, which a data set may bring along, are read without running what is in them."""

from __future__ import annotations

import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest
from ultralytics.cfg import get_cfg
from ultralytics.data import dataset
from ultralytics.data.dataset import DATASET_CACHE_VERSION
from ultralytics.data.utils import load_dataset_cache_file, save_dataset_cache_file

LABELS = {
    "detect": "0 0.5 0.5 0.5 0.5\n",
    "segment": "0 0.1 0.1 0.9 0.1 0.9 0.9\n",
    "pose": "0 0.5 0.5 0.5 0.5 0.4 0.4 1\n",
    "obb": "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9\n",
}


def yolo_data_set(folder: Path, task: str = "detect") -> Any:
    return dataset.YOLODataset(
        img_path=str(folder / "images" / "train"),
        imgsz=32,
        augment=False,
        hyp=get_cfg(),
        task=task,
        data={"names": {0: "a"}, "nc": 1, "channels": 3, "kpt_shape": [1, 3]},
    )


def classify_data_set(folder: Path) -> Any:
    args = SimpleNamespace(**{**vars(get_cfg()), "imgsz": 32, "cache": False})
    return dataset.ClassificationDataset(str(folder / "images"), args, prefix="train")


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("task", LABELS)
def test_what_ultralytics_writes_is_read_and_not_made_anew(
    task: str, make_data_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data_set(label=LABELS[task])
    made = yolo_data_set(folder, task)
    cache = folder / "labels" / "train.cache"
    assert equal(np.load(cache, allow_pickle=True).item(), load_dataset_cache_file(cache))
    monkeypatch.setattr(dataset.YOLODataset, "cache_labels", lambda *_: pytest.fail("read anew"))
    assert equal(yolo_data_set(folder, task).labels, made.labels)


def test_the_cache_of_a_classification_is_read_too(
    make_data_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data_set()
    made = classify_data_set(folder).samples
    monkeypatch.setattr(dataset, "verify_image", lambda *_: pytest.fail("read anew"))
    assert [list(map(str, sample)) for sample in classify_data_set(folder).samples] == [
        list(map(str, sample)) for sample in made
    ]


def test_numbers_of_every_kind_are_read(tmp_path: Path) -> None:
    cache = {
        "numbers": [np.float32(2), np.int64(-3), np.bool_(True), 1 << 70],
        "arrays": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 4), "f4"), np.array(5, "u1")],
        "plain": ("a", 1.5, None, b"x", [{}]),
    }
    np.save("a.npy", cache, allow_pickle=True)  # type: ignore[arg-type]
    found = load_dataset_cache_file(Path("a.npy"))
    assert equal(found, cache)
    assert all(array.flags.writeable for array in found["arrays"])


@pytest.mark.parametrize("kind", ["detect", "classify"])
def test_a_cache_with_code_is_not_run_and_made_anew(
    kind: str, evil: Any, canary: Path, make_data_set: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    make, folder = {"detect": yolo_data_set, "classify": classify_data_set}[kind], make_data_set()
    first = make(folder)
    cache = folder / ("labels/train.cache" if kind == "detect" else "images.cache")
    for hostile in ({**np.load(cache, allow_pickle=True).item(), "labels": evil}, evil):
        save_dataset_cache_file("", cache, {"x": hostile}, DATASET_CACHE_VERSION)
        caplog.clear()
        again = make(folder)
        assert not canary.exists()
        assert len(again) == len(first) > 0
        lines = [line for line in caplog.messages if "Nothing in it was run" in line]
        assert len(lines) == 1
        assert "builtins.eval" in lines[0]
        assert load_dataset_cache_file(cache)["version"] == DATASET_CACHE_VERSION  # a new file replaces it


def test_processes_may_read_and_write_a_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as the ranks of a training, or trainings on the same images: it is one whole cache at any moment."""
    cache, write = tmp_path / "train.cache", np.save
    save_dataset_cache_file("", cache, {"images": 1}, DATASET_CACHE_VERSION)

    def write_slowly(file: IO[bytes], content: Any) -> None:
        file.write(b"\x93NUM")
        assert load_dataset_cache_file(cache)["images"] == 1
        monkeypatch.setattr(np, "save", write)
        save_dataset_cache_file("", cache, {"images": 3}, DATASET_CACHE_VERSION)  # by another process
        assert load_dataset_cache_file(cache)["images"] == 3
        cache.unlink()  # by one without this package, which is about to write
        file.seek(0)
        write(file, content)

    monkeypatch.setattr(np, "save", write_slowly)
    save_dataset_cache_file("", cache, {"images": 2}, DATASET_CACHE_VERSION)
    assert load_dataset_cache_file(cache) == {"images": 2, "version": DATASET_CACHE_VERSION}
    assert [file.name for file in tmp_path.iterdir()] == ["train.cache"]
    for digit, age_s in (("0", 0), ("1", 7200)):  # of a process that still writes, and of one that was killed
        left = tmp_path / f"train.cache.{digit * 32}"
        left.touch()
        os.utime(left, (time.time() - age_s,) * 2)
    save_dataset_cache_file("", cache, {"images": 4}, DATASET_CACHE_VERSION)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.cache", f"train.cache.{'0' * 32}"]
    caplog.clear()
    save_dataset_cache_file("", tmp_path / "none" / "train.cache", {}, DATASET_CACHE_VERSION)
    assert "train.cache could not be written, [Errno 2]" in caplog.text


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


ARRAY, DTYPE = name("numpy.core.multiarray", "_reconstruct"), name("numpy", "dtype")
EMPTY = ARRAY + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
OBJECTS = DTYPE + text("O8") + b"\x89\x88\x87R"
FLOATS = DTYPE + text("f4") + b"\x89\x88\x87R"


def array(shape: bytes, dtype: bytes, data: bytes) -> bytes:
    return EMPTY + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


HOSTILE = {
    "call": name("posix", "system") + text("touch CANARY") + b"\x85R",
    "name with a dot": name("numpy", "core.multiarray.scalar"),
    "module of NumPy": name("numpy", "load") + text("x") + b"\x85R",
    "object pointers as bytes": array(b"K\x01\x85", OBJECTS, b"C\x08" + b"A" * 8),
    "type with fields": name("numpy", "dtype") + text("V8") + b"\x85R",
    "type with a state": array(
        b"K\x01\x85", DTYPE + text("f4") + b"\x85R(K\x03" + text(">") + b"tb", b"C\x04" + b"\0" * 4
    ),
    "too few bytes": array(b"K\x05\x85", FLOATS, b"C\x04" + b"\0" * 4),
    "enormous": array(b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85", FLOATS, b"C\x04" + b"\0" * 4),
    "attribute of a reader's class": ARRAY + b"N}" + text("__setstate__") + DTYPE + b"s\x86b",
    "array without a state": EMPTY,
    "array in a tuple": array(b")", FLOATS, b"C\x04" + b"\0" * 4) + b"\x85",
    "array as a key": b"}" + array(b")", FLOATS, b"C\x04" + b"\0" * 4) + b"Ns",
    "class as a value": ARRAY,
    "persistent id": b"Px\n",
    "extension": b"\x82\x01",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_crafted_cache_is_an_error_that_ultralytics_answers_by_reading_labels(kind: str, canary: Path) -> None:
    from yolov12.untrusted import label_cache

    before = {each: vars(each).copy() for each in (label_cache._Array, label_cache._DType, label_cache._Scalar)}
    np.save("a.npy", {}, allow_pickle=True)  # type: ignore[arg-type]
    head = Path("a.npy").read_bytes().partition(b"\x80")[0]
    body = b"}" + text("labels") + HOSTILE[kind] + b"s"
    Path("a.npy").write_bytes(head + b"\x80\x02" + array(b")", OBJECTS, b"(" + body + b"l") + b".")
    with pytest.raises((pickle.UnpicklingError, ValueError, AttributeError, TypeError)):
        load_dataset_cache_file(Path("a.npy"))
    assert not canary.exists()
    assert {each: vars(each) for each in before} == before


def test_nesting_and_sharing_do_not_hang_the_reader() -> None:
    shared: list[Any] = []
    for _ in range(60):
        shared = [shared, shared]  # a walk along every path would never end
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    np.save("a.npy", {"a": shared, "b": deep}, allow_pickle=True)  # type: ignore[arg-type]
    assert len(load_dataset_cache_file(Path("a.npy"))["a"]) == 2


def test_a_missing_cache_is_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError):
        load_dataset_cache_file(Path("none.cache"))
    assert not caplog.messages


def test_the_switch_reads_it_as_ultralytics_does(evil: Any, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOV12_TRUST_DATA", "1")
    np.save("a.npy", {"x": evil}, allow_pickle=True)  # type: ignore[arg-type]
    load_dataset_cache_file(Path("a.npy"))
    assert canary.exists()
