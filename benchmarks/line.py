"""The story of an inspection line: two defect classes arrive, and `yolov12 watch` retrains with nobody at the terminal.

    python -m benchmarks line --out benchmarks/results/line.json                  (twenty minutes on one GPU)
    python -m benchmarks line --out line.json --small --device cpu                (minutes on two CPU cores)
    python -m benchmarks line --out line.json --only base watch                   (some parts; others stay in the file)
    python -m benchmarks line --out line.json --base FOLDER                       (with a base model that is there)

The line has boards with eight classes. Then a new product arrives: boards on which parts are also `missing` or that
have a `scratch`. They have no connectors and no bridges, so a model that is trained with them alone forgets these. All
objects on them are labelled.

Part `base`: the base model is trained on other boards of the line, as the demonstration's model is
(`python -m benchmarks demo_model --out FOLDER --hold-back missing+scratch --epochs 36`), and validated on the line's.

Part `watch`: the watch serves the base model. Images of the new product arrive in its inbox, and some that are damaged.
It trains with a batch of 128 images, mosaic in every image and mixup, under a limit of 32 GiB (on the CPU: 2 GiB),
while another process takes and releases memory (benchmarks/neighbour.py). On a GPU, the two share what would be a card
of 32 GiB. Mosaic and mixup end some epochs before the training does (`close_mosaic`). In the middle, the watch, the
training and its workers are killed with SIGKILL. The watch is started again after a second, as by systemd. Nobody does
anything else until the report is there. `seconds_lost_to_the_kill` is the time from the kill until the training has
made as many updates as before it.

Part `without_replay`: the same training of the same model with the same images, without `replay` and undisturbed.

`table` has the mean AP50-95 of the old classes on the validation boards of the line, and that of the new classes on
boards of the new product that no training has seen. With `--small`, trainings are too short to find the new classes,
and the candidate is mostly not promoted: it shows the way of the story, not its figures.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import demo_model
from benchmarks.common import report
from benchmarks.line_story import NEW, SMALL, Story, draw, write_yaml
from benchmarks.line_watch import Site, deliver, tell

PARTS = ("base", "watch", "without_replay")


def train_base(story: Story, data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the base model, or take the one that is there, and return what it finds."""
    from ultralytics import YOLO

    made = Path(story.base or folder / "made")
    if not story.base:
        device = "cpu" if story.device == "cpu" else int(story.device)
        demo_model.run(made, device, story.base_images, story.base_epochs, "+".join(NEW))
    shutil.copy(made / "yolov12n-demo.pt", folder / "base.pt")
    settings = {"imgsz": story.imgsz, "device": story.device, "project": str(folder), "plots": False}
    found = YOLO(folder / "base.pt").val(data=data["old"], **settings)
    return {
        "made": json.loads((made / "demo_model.json").read_text()),
        "map50": round(float(found.box.map50), 4),
        "map50_95": round(float(found.box.map), 4),
    }


def watch(story: Story, data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Let the watch serve the base model while the new product arrives, and return what happened."""
    place = folder / "line"
    shutil.rmtree(place, ignore_errors=True)
    (place / "inbox").mkdir(parents=True)
    shutil.copy(folder / "base.pt", place / "serving.pt")
    # The attempt begins when one class has `min_images` images. Those of the most frequent class arrive last, so that
    # all are there when it begins.
    frequent = max(data["names"], key=lambda name: _images_with(data, name))
    arriving = sorted(data["images"], key=lambda image: _has(data, image, frequent))
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
    file = write_yaml(folder / "product", names, {"train": "train.txt", "val": "val.txt"})
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
    parser = report.parser(__doc__, parts=PARTS)
    parser.add_argument("--small", action="store_true", help="few images and epochs, for the CPU")
    parser.add_argument("--runs", type=Path, default=Path("runs/line"), help="folder of data and trainings")
    parser.add_argument("--base", help="folder of a base model that is there")
    for name in ("base_images", "base_epochs", "epochs", "close_mosaic", "workers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("lr0", "replay_fraction", "mosaic", "mixup", "margin", "kill_at", "patience_s"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float)
    for name in ("device", "mem_limit"):
        parser.add_argument(f"--{name.replace('_', '-')}")
    options = vars(parser.parse_args())
    os.environ.setdefault("YOLO_OFFLINE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the watch and its training as well
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

    found = report.Report(out, story.device, keep=True, story=asdict(story))
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
        found.write()
    return found


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
