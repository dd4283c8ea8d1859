"""How the model that comes with the demonstration was trained: YOLOv12-N on the base classes of `data=demo`.

    python -m benchmarks demo_model --out FOLDER                          (ten minutes on one GPU)
    python -m benchmarks demo_model --out FOLDER --hold-back missing+scratch --epochs 36     (for benchmarks/line.py)
    python -m benchmarks demo_model --out FOLDER --small --device cpu     (a minute, to try it)

The boards are those of seed 1. `scripts/train.sh` trains and validates on boards of seed 0, which this model has never
seen, and the last two defect classes are on no board of it. FOLDER gets `yolov12n-demo.pt`, weights in half precision,
and `demo_model.json`: how the model was made, and what it finds on the validation boards of seed 0.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import report

IMGSZ = 320
TRAINING = {
    "model": "yolov12n.yaml",
    "imgsz": IMGSZ,
    "batch": 64,
    "close_mosaic": 10,
    "cache": "ram",
    "seed": 0,
    "val": False,  # but for the last epoch
}


def main() -> None:
    """Read the command line, and make the model."""
    parser = report.parser(__doc__, small="40 images and one epoch")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=42)
    parser.add_argument("--hold-back", default="True", help="see `hold_back` of data=demo")
    options = parser.parse_args()
    if options.small:
        options.images, options.epochs = 40, 1
    os.environ.setdefault("YOLO_OFFLINE", "1")
    from yolov12 import autopatch

    autopatch.apply()
    device = 0 if options.device == "cuda" else "cpu"
    run(options.out, device, options.images, options.epochs, options.hold_back)
    print((options.out / "demo_model.json").read_text())


def run(folder: Path, device: int | str, images: int, epochs: int, hold_back: str) -> None:
    """Train the model, validate it on other boards, and write both files.

    Args:
        folder: Folder of the files.
        device: Device of the training.
        images: Number of boards, a twentieth of which are for validation.
        epochs: Epochs of the training.
        hold_back: Classes that are on no board; see `hold_back` of `data=demo`.
    """
    from ultralytics import YOLO

    folder.mkdir(parents=True, exist_ok=True)
    data = f"demo:images={images},seed=1,val=0.05,hold_back={hold_back}"
    others = f"demo:images=400,val=0.5,hold_back={hold_back}"
    started = time.perf_counter()
    settings = {key: value for key, value in TRAINING.items() if key != "model"}
    model = YOLO(TRAINING["model"])
    where = {"project": str(Path(tempfile.gettempdir(), "demo_model")), "name": "train", "exist_ok": True}
    model.train(**settings, **where, data=data, epochs=epochs, device=device, workers=8, plots=False)
    seconds = time.perf_counter() - started
    file = folder / "yolov12n-demo.pt"
    _save(model, file, {**settings, "task": "detect", "model": TRAINING["model"], "epochs": epochs})
    found = YOLO(str(file)).val(data=others, imgsz=IMGSZ, batch=64, device=device, plots=False)
    report.Report(
        folder / "demo_model.json",
        "cpu" if device == "cpu" else "cuda",
        data=data,
        training={**TRAINING, "epochs": epochs},
        seconds=round(seconds),
        file={"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
        validation={
            "data": others,
            "map50": round(float(found.box.map50), 4),
            "map50_95": round(float(found.box.map), 4),
            "map50_of_class": {
                found.names[c]: round(float(found.box.ap50[i]), 4) for i, c in enumerate(found.box.ap_class_index)
            },
        },
    ).write()


def _save(model: Any, file: Path, train_args: dict[str, Any]) -> None:
    """Write a checkpoint without the paths and the settings of the machine that trained it."""
    import torch

    network = model.model.cpu().float()
    for each in network.parameters():
        each.requires_grad = False
    vars(network).pop("pt_path", None)
    network.args = {"imgsz": IMGSZ, "task": "detect"}
    network.yaml = {key: value for key, value in network.yaml.items() if key != "yaml_file"}
    torch.save({"model": network.half(), "train_args": train_args, "license": "AGPL-3.0"}, file)


if __name__ == "__main__":
    main()
