"""Two classes that arrive: what their rows should start from, and what `replay` keeps of the old classes.

    python -m benchmarks classes --out benchmarks/results/classes.json             (an hour on two CPU cores)
    python -m benchmarks classes --out part.json --base best.pt --seeds 0          (with a base model that is there)
    python -m benchmarks classes --out part.json --base best.pt --part replay      (one of the two parts)

YOLOv12-N at 320 pixels is trained on `data=demo:hold_back=True` (8 classes), then for the defect classes `shifted` and
`crack` as well.

Part `starts`: it is trained on `data=demo`. The rows of the old classes are kept by name. The rows of the two new
classes, in the last convolution of each classification branch, start from:

    stock       random weights, bias of a rare class (Ultralytics' own initialisation)
    zero        no weights, the same bias
    mean        the mean of the old classes' weights, the same bias
    mean_bias   the mean of the old classes' weights and biases

`cls_loss` is the classification loss of each epoch. AP is from validations after each epoch, averaged over the two new
classes and over the eight old ones.

Part `replay`: it is trained on 48 images of `data=demo` that show a new defect, in which only the new defects are
labelled, without `replay` and with the training images of `data=demo:hold_back=True`. Old objects in the new images are
background. The rows are the table of classes: mean AP50 and AP50-95 of each group before and after, on the validation
images of `data=demo`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.common import report

STARTS = ("stock", "zero", "mean", "mean_bias")
FRACTIONS = (None, 0.3, 0.5)
REPLAY_EPOCHS, NEW_IMAGES = 4, 48
TRAINING: dict[str, Any] = {
    "imgsz": 320,
    "batch": 4,
    "nbs": 4,
    "optimizer": "AdamW",
    "mosaic": 0.0,
    "recipe": False,
    "close_mosaic": 0,
    "plots": False,
    "device": "cpu",
    "workers": 0,
    "exist_ok": True,
}


def start(model: Any, known: set[str], how: str) -> None:
    """Give the rows of new classes their first values.

    Args:
        model: Detection model with the names of its classes and the rows of known classes.
        known: Names of the classes that the base model knows.
        how: One of `STARTS`.
    """
    import torch

    old = [index for index, name in model.names.items() if name in known]
    new = [index for index, name in model.names.items() if name not in known]
    with torch.no_grad():
        for branch in model.model[-1].cv3:
            row = branch[-1]
            if how == "zero":
                row.weight[new] = 0.0
            if how in ("mean", "mean_bias"):
                row.weight[new] = row.weight[old].mean(0)
            if how == "mean_bias":
                row.bias[new] = row.bias[old].mean()


def train_base(folder: Path, epochs: int) -> str:
    """Train the base model on the eight classes, and return its path."""
    from ultralytics import YOLO

    yolo = YOLO("yolov12n.yaml")
    yolo.train(
        data="demo:hold_back=True", epochs=epochs, lr0=0.002, val=False, project=str(folder), name="base", **TRAINING
    )
    return str(yolo.trainer.last)


def fine_tune(base: str, how: str, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train a base model on all ten classes, and return a row of the result."""
    import numpy as np
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    yolo = YOLO(base)
    known = set(yolo.names.values())

    class Trainer(DetectionTrainer):
        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().get_model(*args, **kwargs)
            start(model, known, how)
            return model

    row: dict[str, Any] = {"start": how, "seed": seed, "cls_loss": []}
    row |= {f"{group}_{ap}": [] for group in ("new", "old") for ap in ("ap50", "ap")}

    def note(trainer: Any) -> None:
        if len(row["cls_loss"]) == epochs:
            return  # the validation of best.pt
        metrics, names = trainer.validator.metrics.box, trainer.data["names"]
        row["cls_loss"].append(round(float(trainer.tloss["cls_loss"]), 4))
        is_new = np.array([names[int(index)] not in known for index in metrics.ap_class_index])
        for group, chosen in (("new", is_new), ("old", ~is_new)):
            row[f"{group}_ap50"].append(round(float(metrics.ap50[chosen].mean()), 4))
            row[f"{group}_ap"].append(round(float(metrics.ap[chosen].mean()), 4))

    yolo.add_callback("on_fit_epoch_end", note)
    arguments = {**TRAINING, "epochs": epochs, "lr0": 0.001, "warmup_epochs": 0.0, "seed": seed}
    yolo.train(trainer=Trainer, data="demo", project=str(folder), name=f"{how}-{seed}", **arguments)
    return row


def defects_alone(folder: Path) -> tuple[str, str]:
    """Copy some of the demo's images with new defects, labelled with these alone.

    Args:
        folder: Folder to make.

    Returns:
        Path of their yaml, and of one of the old training images.
    """
    import shutil

    import yaml
    from ultralytics.utils import SETTINGS

    from yolov12.demo.dataset import ensure

    demo, old = (ensure(name, Path(SETTINGS["datasets_dir"])) for name in ("demo", "demo:hold_back=True"))
    about = yaml.safe_load(demo.read_text())
    new = {str(index) for index, name in about["names"].items() if name in ("shifted", "crack")}
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    count = 0
    for file in sorted((demo.parent / "labels" / "train").glob("*.txt")):
        lines = [line for line in file.read_text().splitlines() if line.split()[0] in new]
        if lines and count < NEW_IMAGES:
            count += 1
            (folder / "labels" / file.name).write_text("\n".join(lines))
            shutil.copy(demo.parent / "images" / "train" / f"{file.stem}.jpg", folder / "images")
    val = str(demo.parent / "images" / "val")
    text = yaml.safe_dump({"path": str(folder), "train": "images", "val": val, "names": about["names"]})
    (folder / "data.yaml").write_text(text)
    only_train = {**yaml.safe_load(old.read_text()), "path": str(old.parent), "val": None}
    (folder / "old.yaml").write_text(yaml.safe_dump(only_train))
    return str(folder / "data.yaml"), str(folder / "old.yaml")


def forget(base: str, replay_fraction: float | None, seed: int, folder: Path) -> dict[str, Any]:
    """Train a base model on new defects alone, with or without old images, and return a row of the result."""
    from statistics import mean

    from ultralytics import YOLO

    from yolov12.training.classes import table

    data, old = defects_alone(folder / "new")
    replay = {"replay": old, "replay_fraction": replay_fraction} if replay_fraction else {}
    yolo = YOLO(base)
    arguments = {**TRAINING, "epochs": REPLAY_EPOCHS, "lr0": 0.0005, "seed": seed, **replay}
    name = f"replay-{replay_fraction or 0}-{seed}"
    yolo.train(data=data, project=str(folder), name=name, **arguments)
    rows = table.read(folder / name / "classes.csv")
    result: dict[str, Any] = {"replay_fraction": replay_fraction or 0, "seed": seed}
    for group, known in (("old", True), ("new", False)):
        for when in ("before", "after"):
            pairs = [pair for row in rows if row.known is known and (pair := getattr(row, when)) is not None]
            result[f"{group}_{when}"] = [round(mean(each), 4) for each in zip(*pairs, strict=True)]
    return result


def main() -> None:
    """Train, and write the rows as JSON after each training."""
    parser = report.parser(__doc__)
    parser.add_argument("--base", help="base model that knows the eight classes; without it, one is trained")
    parser.add_argument("--base-epochs", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--part", choices=("starts", "replay"), help="one part; without it, both")
    parser.add_argument("--runs", type=Path, default=Path("runs/classes"), help="folder of the trainings")
    args = parser.parse_args()
    os.environ.setdefault("YOLO_OFFLINE", "1")

    from yolov12 import autopatch

    autopatch.apply()
    base = args.base or train_base(args.runs.absolute(), args.base_epochs)
    found = report.Report(
        args.out,
        "cpu",
        base_epochs=None if args.base else args.base_epochs,
        training=TRAINING,
        starts=[],
        replay_epochs=REPLAY_EPOCHS,
        replay=[],
    )
    for seed in args.seeds:
        for how in STARTS if args.part != "replay" else ():
            found["starts"].append(fine_tune(base, how, seed, args.epochs, args.runs.absolute()))
            found.write()
        for fraction in FRACTIONS if args.part != "starts" else ():
            found["replay"].append(forget(base, fraction, seed, args.runs.absolute()))
            found.write()


if __name__ == "__main__":
    main()
