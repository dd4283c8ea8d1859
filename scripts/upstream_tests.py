"""Runs Ultralytics' own tests with and without this package, and names those that pass only without it.

The tests come from the source distribution of the pinned release, whose hash is in requirements/lock.txt. They run
offline: weights are untrained and data sets are drawn, under the names that the tests use. A test that needs a trained
model or the network fails in both runs, which is no finding.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

HERE = Path(__file__).resolve()
LOCK = HERE.parents[1] / "requirements" / "lock.txt"
LOG = "UPSTREAM_TESTS_LOG"
SECONDS = 240  # for a test

WEIGHTS = {
    **{f"yolo26n{task}.pt": f"yolo26n{task}.yaml" for task in ("", "-seg", "-pose", "-obb", "-cls", "-sem", "-depth")},
    **{f"yolo26s{task}.pt": f"yolo26s{task}.yaml" for task in ("", "-seg", "-pose", "-obb")},
    "yolo11n.pt": "yolo11n.yaml",
    "yolo11n-grayscale.pt": "yolo11n.yaml",
    "FastSAM-s.pt": "yolov8s-seg.yaml",
    "rtdetr-l.pt": "rtdetr-l.yaml",
}
DATA = {
    "coco8": "detect",
    "coco8-grayscale": "detect",
    "coco128": "detect",
    "coco8-seg": "segment",
    "coco8-pose": "pose",
    "dota8": "obb",
    "cityscapes8": "semantic",
    "depth8-png": "depth",
}


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test's phase: this file is a plugin of the tests, too."""
    with Path(os.environ[LOG]).open("a") as file:
        print(json.dumps([report.nodeid, report.outcome]), file=file)


def fetch(folder: Path) -> Path:
    """Download the source distribution, and return the folder that it was unpacked to."""
    lines = LOCK.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("ultralytics=="))
    stop = next(index for index in range(start, len(lines)) if not lines[index].endswith("\\"))
    requirement = folder / "ultralytics.txt"
    requirement.write_text("\n".join(lines[start : stop + 1]))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    where = ["--no-binary", "ultralytics", "--require-hashes", "--requirement", str(requirement), "--dest", str(folder)]
    subprocess.run([*pip, *where], check=True)
    (archive,) = folder.glob("ultralytics-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def environment(home: Path, patched: bool) -> dict[str, str]:
    """Return the environment of a run whose settings, weights and data sets are in `home`."""
    return {
        **os.environ,
        "YOLO_CONFIG_DIR": str(home / "config"),
        "YOLO_OFFLINE": "1",
        "YOLO_AUTOINSTALL": "0",
        "YOLOV12_AUTOPATCH": str(int(patched)),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
        LOG: str(home / "outcomes.jsonl"),
    }


def furnish(home: Path) -> None:
    """Write settings, untrained weights and drawn data sets; called in a process of its own, without this package."""
    import torch
    from ultralytics import RTDETR, YOLO
    from ultralytics.cfg import TASK2DATA
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG_DICT, SETTINGS

    SETTINGS.update({f"{name}_dir": str(home / name) for name in ("datasets", "weights", "runs")})
    spaces = home / "weights" / "path with spaces"
    spaces.mkdir(parents=True)
    for name, cfg in WEIGHTS.items():
        torch.manual_seed(0)
        yolo = (RTDETR if name.startswith("rtdetr") else YOLO)(cfg)
        model = DetectionModel(cfg, ch=1, verbose=False) if "grayscale" in name else yolo.model
        arguments = {**DEFAULT_CFG_DICT, "task": yolo.task, "model": cfg, "data": TASK2DATA[yolo.task]}
        checkpoint = {"model": model.half(), "ema": None, "epoch": -1, "optimizer": None, "train_args": arguments}
        torch.save(checkpoint, home / "weights" / name)
        if name.startswith("yolo26n"):
            shutil.copy(home / "weights" / name, spaces)
    for name, task in DATA.items():
        for split in ("train2017",) if name == "coco128" else ("train", "val"):
            draw(home / "datasets" / name, split, task)
    for split in ("train", "val", "test"):
        draw_classes(home / "datasets" / "imagenet10", split)


def draw(folder: Path, split: str, task: str) -> None:
    """Draw four images with a bright rectangle each, and their labels."""
    dense = {"semantic": "masks", "depth": "depth"}.get(task, "labels")
    for kind in ("images", dense):
        (folder / kind / split).mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(4):
        image = random.integers(0, 80, (96, 128, 3), dtype=np.uint8)
        left, top, right, bottom = 0.2, 0.25, 0.5 + index / 10, 0.75
        inside = slice(int(top * 96), int(bottom * 96)), slice(int(left * 128), int(right * 128))
        image[inside] = 255
        cv2.imwrite(str(folder / "images" / split / f"{index}.jpg"), image)
        box = f"{(left + right) / 2} {(top + bottom) / 2} {right - left} {bottom - top}"
        corners = f"{left} {top} {right} {top} {right} {bottom} {left} {bottom}"
        points = " ".join(f"{left + (right - left) * each / 16} {top} 2" for each in range(17))
        label = {"detect": box, "segment": corners, "obb": corners, "pose": f"{box} {points}"}.get(task)
        target = folder / dense / split / f"{index}"
        if label is not None:
            target.with_suffix(".txt").write_text(f"0 {label}\n")
            continue
        values = np.full((96, 128), 7, np.uint8) if task == "semantic" else np.full((96, 128), 2000, np.uint16)
        values[inside] = 26 if task == "semantic" else 1000
        cv2.imwrite(str(target.with_suffix(".png")), values)


def draw_classes(folder: Path, split: str) -> None:
    """Draw two images of each of ten classes, which differ in brightness."""
    for index in range(10):
        (folder / split / f"class{index}").mkdir(parents=True)
        for number in range(2):
            image = np.full((64, 64, 3), 20 * index + number, np.uint8)
            cv2.imwrite(str(folder / split / f"class{index}" / f"{number}.jpg"), image)


def run(folder: Path, patched: bool, tests: Iterable[str], options: Sequence[str] = ()) -> dict[str, str]:
    """Run tests in a folder, each file in a process of its own; return test → outcome."""
    env = environment(folder, patched)
    log = Path(env[LOG])
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", HERE.stem, "-p", "no:cacheprovider", "-o", "addopts=", "-q"]
    for test in tests:
        subprocess.run([*command, f"--timeout={SECONDS}", "--tb=short", *options, test], cwd=folder, env=env)
    outcomes: dict[str, str] = {}
    for line in log.read_text().splitlines() if log.exists() else []:
        name, outcome = json.loads(line)
        if outcomes.get(name) in (None, "passed"):
            outcomes[name] = outcome
    return outcomes


def main() -> int:
    """Compare both runs, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FILE", help="files of tests, such as test_engine.py")
    parser.add_argument("--folder", type=Path, help="empty or missing folder to keep everything in")
    parser.add_argument("--furnish", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="arguments for pytest, after --")
    given = parser.parse_args()
    if given.furnish:
        furnish(given.furnish)
        return 0
    folder = given.folder or Path(tempfile.mkdtemp(prefix="upstream-tests-"))
    folder.mkdir(parents=True, exist_ok=True)
    source = fetch(folder)
    files = given.only or sorted(file.name for file in (source / "tests").glob("test_*.py"))
    found = {}
    for name, patched in (("stock", False), ("patched", True)):
        home = folder / name
        shutil.copytree(source / "tests", home / "tests")
        shutil.copy(source / "pyproject.toml", home)
        subprocess.run([sys.executable, HERE, "--furnish", home], env=environment(home, False), check=True)
        found[name] = run(home, patched, [f"tests/{file}" for file in files], given.options)
        print(f"{name}: {dict(Counter(found[name].values()))}", flush=True)
    worse = [test for test, outcome in found["stock"].items() if outcome == "passed" != found["patched"].get(test)]
    if worse:  # once more, as a busy machine may be slow
        again = run(folder / "patched", True, worse, given.options)
        worse = [test for test in worse if again.get(test) != "passed"]
    print(
        "\n".join(f"passes on stock, fails here: {test}" for test in worse) or "nothing passes on stock and fails here"
    )
    if not worse and given.folder is None:
        shutil.rmtree(folder)
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
