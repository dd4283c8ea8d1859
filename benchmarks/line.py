"""The story of an inspection line: two defect classes arrive, and `yolov12 watch` retrains with nobody at the terminal.

    python benchmarks/line.py --out benchmarks/results/line.json                  (eight minutes on one GPU)
    python benchmarks/line.py --out line.json --small --device cpu                (minutes on two CPU cores)
    python benchmarks/line.py --out line.json --only base watch                   (some parts; others stay in the file)
    python benchmarks/line.py --out line.json --base scratch --base-epochs 60     (without the demo model)

The line has boards with eight classes. Then a new product arrives: boards on which parts are also `shifted` or have a
`crack`. They have no connectors, scratches and bridges, so a model that is trained with them alone forgets these. All
objects on them are labelled.

Part `base`: the base model is trained on the line's boards, from the demo model that comes with the package.

Part `watch`: the watch serves the base model. Images of the new product arrive in its inbox, and some that are damaged.
It trains with a batch of 128 images, mosaic and mixup in every image, under a limit of 32 GiB (on the CPU: 2 GiB),
while another process takes and releases memory (benchmarks/neighbour.py). On a GPU, the two share what would be a card
of 32 GiB. Mosaic and mixup end some epochs before the training does (`close_mosaic`). In the middle, the watch, the
training and its workers are killed with SIGKILL. The watch is started again after a second, as by systemd. Nobody does
anything else until the report is there. `seconds_lost_to_the_kill` is the time from the kill until the training has
made as many updates as before it.

Part `without_replay`: the same training of the same model with the same images, without `replay` and undisturbed.

`table` has the mean AP50-95 of the old classes on the validation boards of the line, and that of the new classes on
boards of the new product that no training has seen. With `--small`, trainings are too short to find the new classes, and
the candidate is mostly not promoted: it shows the way of the story, not its figures.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.line_watch import Site, deliver, tell

NEW, ABSENT = ("shifted", "crack"), ("connector", "scratch", "bridge")
PARTS = ("base", "watch", "without_replay")


@dataclass(frozen=True)
class Story:
    """Sizes and settings of the story."""

    base: str = "yolov12n-demo.pt"
    """Model that the base training starts from; `scratch` for yolov12n.yaml."""
    base_epochs: int = 25
    old: str = "demo:images=1000,val=0.2,hold_back=True"
    """Boards of the line."""
    drawn: tuple[str, ...] = tuple(f"demo:images=250,seed={seed},val=0.2" for seed in range(2, 34))
    """Boards from which those of the new product are chosen. Those in `val` are for the table alone."""
    epochs: int = 40
    close_mosaic: int = 20
    mosaic: float = 1.0
    mixup: float = 1.0
    warmup_epochs: float = 3.0
    lr0: float = 0.001
    replay_fraction: float = 0.5
    batch: int = 128
    imgsz: int = 320
    device: str = "0"
    workers: int = 8
    cache: str = "ram"
    mem_limit: str = "32GiB"
    save_every: str = "10s"
    neighbour: tuple[int, ...] = (32 << 10, 22 << 10, 26 << 10, 4)
    """Pool, least and most MiB, and seed."""
    kill_at: float = 0.3
    """Fraction of the epochs after which everything is killed."""
    kill_after_s: float = 1.5
    """Seconds after the end of that epoch, so that the next one is under way."""
    margin: float = 0.05
    """Larger than the default: rare classes (`bridge`, `scratch`) differ by some points from training to training."""
    damaged: int = 2
    """Number of damaged images that arrive."""
    settle: str = "1s"
    patience_s: float = 480.0

    def training(self, epochs: int) -> dict[str, Any]:
        """Return the arguments that all trainings have."""
        names = ("batch", "imgsz", "device", "workers", "cache", "mem_limit", "lr0", "warmup_epochs")
        own = {name: getattr(self, name) for name in names}
        # Ultralytics' default warm-up of biases is for SGD: with AdamW it undoes what the model knows.
        return {**own, "optimizer": "AdamW", "warmup_bias_lr": 0.0, "epochs": epochs, "plots": False}

    def retraining(self) -> dict[str, Any]:
        """Return the arguments of the trainings for the new classes."""
        own = {name: getattr(self, name) for name in ("mosaic", "mixup", "close_mosaic")}
        return {**self.training(self.epochs), **own}


SMALL = Story(
    base_epochs=1,
    old="demo:images=60,val=0.5,hold_back=True",
    drawn=("demo:images=250,seed=2,val=0.2",),
    epochs=6,
    close_mosaic=3,
    warmup_epochs=0.0,
    lr0=0.0002,
    device="cpu",
    workers=0,
    mem_limit="2GiB",
    save_every="2",
    neighbour=(0, 256, 1024, 4),
    kill_after_s=0.0,
    patience_s=1500.0,
)


def draw(story: Story, folder: Path) -> dict[str, Any]:
    """Draw all boards, each data set in a process of its own, and choose those of the new product.

    Args:
        story: Sizes and settings.
        folder: Folder for the data.

    Returns:
        `old` and `holdout`, paths of data set yamls, and `images`, those that will arrive.
    """
    import yaml

    code = "import sys, pathlib; from yolov12 import demo; print(demo.ensure(sys.argv[1], pathlib.Path(sys.argv[2])))"
    folder.mkdir(parents=True, exist_ok=True)

    def ensure(spec: str) -> Path:
        words = [sys.executable, "-c", code, spec, str(folder)]
        return Path(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        old, *drawn = pool.map(ensure, (story.old, *story.drawn))
    all_names: dict[int, str] = yaml.safe_load(drawn[0].read_text())["names"]
    ids = {name: str(index) for index, name in all_names.items()}
    for split in ("train", "val"):
        product = folder / "product" / split
        shutil.rmtree(product, ignore_errors=True)
        for kind in ("images", "labels"):
            (product / kind).mkdir(parents=True)
        for number, data in enumerate(drawn):
            for label in sorted((data.parent / "labels" / split).glob("*.txt")):
                there = {line.split()[0] for line in label.read_text().splitlines()}
                if there & {ids[name] for name in NEW} and not there & {ids[name] for name in ABSENT}:
                    stem = f"{number:02}-{label.stem}"
                    shutil.copy(label, product / "labels" / f"{stem}.txt")
                    shutil.copy(
                        data.parent / "images" / split / f"{label.stem}.jpg", product / "images" / f"{stem}.jpg"
                    )
    holdout = _write_yaml(folder / "product" / "val", all_names, {"train": "images", "val": "images"})
    return {
        "old": str(old),
        "holdout": str(holdout),
        "names": list(all_names.values()),
        "images": sorted((folder / "product" / "train" / "images").iterdir()),
    }


def train_base(story: Story, data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the base model, and return what it finds."""
    from ultralytics import YOLO

    yolo = YOLO("yolov12n.yaml" if story.base == "scratch" else story.base)
    begun = time.perf_counter()
    yolo.train(data=data["old"], project=str(folder), name="base", exist_ok=True, **story.training(story.base_epochs))
    shutil.copy(yolo.trainer.best, folder / "base.pt")
    seconds = time.perf_counter() - begun
    found = yolo.trainer.metrics
    return {
        "from": Path(story.base).name,
        "epochs": story.base_epochs,
        "seconds": round(seconds),
        "map50": round(float(found["metrics/mAP50(B)"]), 4),
        "map50_95": round(float(found["metrics/mAP50-95(B)"]), 4),
    }


def watch(story: Story, data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Let the watch serve the base model while the new product arrives, and return what happened."""
    place = folder / "line"
    shutil.rmtree(place, ignore_errors=True)
    (place / "inbox").mkdir(parents=True)
    shutil.copy(folder / "base.pt", place / "serving.pt")
    frequent = max(NEW, key=lambda name: _images_with(data, name))
    arriving = sorted(
        data["images"], key=lambda image: _has(data, image, frequent)
    )  # then all are there at the trigger
    arguments = {
        **story.retraining(),
        "data": data["old"],
        "replay_fraction": story.replay_fraction,
        "save_every": story.save_every,
        "min_images": _images_with(data, frequent),
        "margin": story.margin,
        "settle": story.settle,
        "poll": "0.2s",
    }
    site = Site(
        folder=place,
        arguments=arguments,
        epochs=story.epochs,
        kill_at=story.kill_at,
        kill_after_s=story.kill_after_s,
        neighbour=(story.device, *story.neighbour),
        patience_s=story.patience_s,
    )
    found = tell(site, functools.partial(deliver, arriving, data["names"], story.damaged))
    report, memory = found.pop("report"), found.pop("memory")
    (attempt,) = (place / "work" / "history").iterdir()
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in (place / "serving.pt", attempt / "candidate.pt")]
    return {
        **found,
        "images": len(arriving),
        "arguments": {key: value for key, value in arguments.items() if key != "data"},
        "promoted": report["outcome"] == "promoted" and digests[0] == digests[1],
        "reasons": report["verdict"]["reasons"],
        "limit_mib": _mib(story.mem_limit),
        **{
            name: memory[name]
            for name in (
                "peak_max_mib",
                "budget_min_mib",
                "budget_max_mib",
                "over_limit",
                "out_of_memories",
                "images_lost",
                "updates",
                "updates_expected",
                "micro_batch_min",
                "micro_batch_max",
                "shrinks",
                "grows",
                "images_per_s",
            )
        },
        "table": measure(story, data, folder / "base.pt", attempt / "candidate.pt"),
    }


def train_without_replay(story: Story, data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the base model with the new product alone, and return what is left of the old classes."""
    from ultralytics import YOLO

    lists = {"val": data["images"][::5], "train": [image for place, image in enumerate(data["images"]) if place % 5]}
    for split, images in lists.items():
        (folder / "product" / f"{split}.txt").write_text("".join(f"{image}\n" for image in images))
    names = dict(enumerate(data["names"]))
    file = _write_yaml(folder / "product", names, {"train": "train.txt", "val": "val.txt"})
    yolo = YOLO(str(folder / "base.pt"))
    begun = time.perf_counter()
    yolo.train(data=str(file), project=str(folder), name="without_replay", exist_ok=True, **story.retraining())
    return {
        "seconds": round(time.perf_counter() - begun),
        "table": measure(story, data, folder / "base.pt", Path(yolo.trainer.best)),
    }


def measure(story: Story, data: Mapping[str, Any], before: Path, after: Path) -> dict[str, Any]:
    """Compare two models, and return the mean AP50-95 of old and new classes, and the classes."""
    from yolov12.watch.comparison import compare

    settings = {"imgsz": story.imgsz, "batch": 64, "device": story.device, "workers": story.workers}
    verdict = compare(before, after, Path(data["old"]), Path(data["holdout"]), story.margin, val_args=settings)
    known, new = ([row for row in verdict.classes if row.is_new is is_new] for is_new in (False, True))
    return {
        "old_before": round(mean(row.serving for row in known if row.serving is not None), 4),
        "old_after": round(mean(row.candidate for row in known if row.candidate is not None), 4),
        "new_after": round(mean(row.candidate or 0.0 for row in new), 4),
        "would_be_promoted": verdict.promote,
        "reasons": verdict.reasons,
        "classes": [asdict(row) for row in verdict.classes],
    }


def holds(found: Mapping[str, Any]) -> dict[str, bool]:
    """Return which promises of the story hold in a result that has the part `watch`."""
    told, table = found["watch"], found["watch"]["table"]
    return {
        "promoted": told["promoted"],
        "old_classes_within_1_point": table["old_after"] >= table["old_before"] - 0.01,
        "new_classes_at_least_0.5": table["new_after"] >= 0.5,
        "less_than_a_minute_lost": told["seconds_lost_to_the_kill"] < 60,
        "nobody_touched_it": told["restarts_by_the_supervisor"] == 1,
        "within_the_limit": told["over_limit"] == 0 and told["peak_max_mib"] <= told["limit_mib"],
        "no_image_lost": told["images_lost"] == 0 and told["updates"] == told["updates_expected"],
    }


def main() -> None:
    """Tell the story, and write the result after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write; other parts in it stay")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--small", action="store_true", help="few images and epochs, for the CPU")
    parser.add_argument("--runs", type=Path, default=Path("runs/line"), help="folder of data and trainings")
    parser.add_argument("--base", help="model that the base training starts from, or scratch")
    for name in ("base_epochs", "epochs", "close_mosaic", "workers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("lr0", "replay_fraction", "mosaic", "mixup", "margin", "kill_at"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    for name in ("device", "mem_limit"):
        parser.add_argument(f"--{name.replace('_', '-')}")
    options = vars(parser.parse_args())
    os.environ.setdefault("YOLO_OFFLINE", "1")
    given = {key: value for key, value in options.items() if key in Story.__annotations__ and value is not None}
    found = tell_all(
        replace(SMALL if options["small"] else Story(), **given),
        options["only"],
        options["runs"].absolute(),
        options["out"],
    )
    print(json.dumps({key: found[key] for key in ("holds", "table", "seconds") if key in found}, indent=1))
    for part in PARTS:
        if error := found.get(part, {}).get("error"):
            sys.exit(f"{part}: {error}")


def tell_all(story: Story, parts: Sequence[str], folder: Path, out: Path) -> dict[str, Any]:
    """Run parts of the story, and write the result after each of them.

    Args:
        story: Sizes and settings.
        parts: Some of `PARTS`, in this order. Without `base`, the folder has its model from an earlier call.
        folder: Folder of data and trainings.
        out: JSON file. Parts that it already has stay.

    Returns:
        Content of the file.
    """
    from yolov12 import autopatch

    autopatch.apply()
    import torch
    import ultralytics

    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found |= {
        "command": "python benchmarks/line.py --out line.json",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": f"{os.cpu_count()} CPU cores" if story.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ultralytics": ultralytics.__version__,
        "story": asdict(story),
    }
    begun = time.perf_counter()
    data = draw(story, folder)
    found["seconds"] = {**found.get("seconds", {}), "draw": round(time.perf_counter() - begun)}
    run = {"base": train_base, "watch": watch, "without_replay": train_without_replay}
    for part in parts:
        begun = time.perf_counter()
        try:
            found[part] = run[part](story, data, folder)
        except Exception:  # the other parts are worth their time all the same
            found[part] = {"error": traceback.format_exc()[-6000:]}
        gc.collect()
        torch.cuda.empty_cache()  # this process shares the card with the watch
        found["seconds"][part] = round(time.perf_counter() - begun)
        found["table"] = [
            {"model": name, **{key: found[name]["table"][key] for key in ("old_before", "old_after", "new_after")}}
            for name in ("watch", "without_replay")
            if "table" in found.get(name, ())
        ]
        if "table" in found.get("watch", ()):
            found["holds"] = holds(found)
        out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _write_yaml(folder: Path, names: Mapping[int, str], splits: Mapping[str, str]) -> Path:
    import yaml

    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump({"path": str(folder), **splits, "names": dict(names)}))
    return file


def _has(data: Mapping[str, Any], image: Path, name: str) -> bool:
    label = image.parents[1] / "labels" / f"{image.stem}.txt"
    index = str(data["names"].index(name))
    return any(line.split()[0] == index for line in label.read_text().splitlines())


def _images_with(data: Mapping[str, Any], name: str) -> int:
    return sum(_has(data, image, name) for image in data["images"])


def _mib(text: str) -> float:
    from yolov12.sizes import parse_memory_size

    size = parse_memory_size(text)
    assert size is not None
    return size / 2**20


if __name__ == "__main__":
    main()
