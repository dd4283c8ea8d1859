"""Choices of a mosaic's other images: mAP of small trainings, and the CPU time of draws by place.

    python -m benchmarks partners --out benchmarks/results/partners.json     (16 minutes on two shared cores)
    python -m benchmarks partners --out part.json --small
    python -m benchmarks partners --out benchmarks/results/partners.json --only cost

Part `map`: a model of eleven layers is trained on drawn images on the CPU. The other images of a mosaic come from the
batch, from the last 64 images of the order, or from all images. Each row has the mAP50-95 of each seed after the last
epoch. The rows of a seed begin with the same weights and have the same order of images.

Part `cost`: CPU milliseconds for one image of this package's loader, with draws by place and with Ultralytics' draws
from the generators of the process. Both load one batch each in turn, in one process. `ratio` is the median over the
pairs of batches.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import report, rounds
from benchmarks.drawings import photographs, shapes

BATCH = 16
CHOICES = {"batch": 16, "last 64": 64, "all": 2**31}
"""Name of a choice → fewest images in a pool. Batches are not larger than the least of them."""
SEEDS = (0, 1, 2)
DATA = {"images": 160, "val": 80, "imgsz": 96}
EPOCHS, CLOSED = 40, 6
CASES: dict[str, dict[str, Any]] = {"files": {}, "ram": {"cache": "ram"}}
COST = {"images": 640, "imgsz": 640, "batches": 24}
MODEL = """nc: 4
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, C2f, [64, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 5], 1, Concat, [1]]
  - [-1, 1, C2f, [64]]
  - [[4, 9, 6], 1, Detect, [nc]]
"""


def partners_from(choice: str) -> Any:
    """Return a context in which mosaic chooses among the images of one of `CHOICES`."""
    from yolov12.training.data import places

    return mock.patch.object(places, "_LEAST", CHOICES[choice])


def train(data: str, choice: str, **arguments: Any) -> float:
    """Train, and return the mAP50-95 after the last epoch.

    Args:
        data: Yaml of the data set.
        choice: One of `CHOICES`.
        arguments: Arguments of the training.
    """
    from ultralytics import YOLO

    found: list[float] = []
    folder = Path(tempfile.mkdtemp())
    (folder / "small.yaml").write_text(MODEL)
    model = YOLO(folder / "small.yaml")
    model.add_callback("on_fit_epoch_end", lambda trainer: found.append(trainer.metrics.get("metrics/mAP50-95(B)", 0)))
    with partners_from(choice):
        model.train(data=data, project=str(folder), **arguments)
    return float(found[arguments["epochs"] - 1])  # a validation of the best weights may follow


def map_part(small: bool) -> dict[str, Any]:
    """Train with each choice and each seed, and return the mAP50-95 of each.

    Args:
        small: True for few images and one epoch.
    """
    numbers, seeds, epochs = (DATA, SEEDS, EPOCHS) if not small else ({"images": 16, "val": 8, "imgsz": 64}, (0,), 1)
    data = shapes(**numbers)
    arguments = {
        "imgsz": numbers["imgsz"],
        "batch": BATCH,
        "nbs": BATCH,
        "epochs": epochs,
        "close_mosaic": CLOSED,
        "optimizer": "AdamW",
        "lr0": 0.005,
        "recipe": False,
        "device": "cpu",
        "workers": 0,
        "val": False,
        "plots": False,
    }
    rows: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for seed, choice in itertools.product(seeds, CHOICES):
        rows[choice].append(train(data, choice, seed=seed, **arguments))
        print(seed, choice, rows[choice][-1], flush=True)
    return {**numbers, "arguments": arguments, "seeds": seeds, "rows": rows}


class _Unplaced:
    """Batch sampler whose images are rendered by this package, with the draws of Ultralytics.

    Args:
        batches: Batch sampler of a loader.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        from yolov12.training.data.places import Later

        return map(Later, self._batches)


def batches_of(data: dict[str, Any], by_place: bool, **arguments: Any) -> Iterator[Any]:
    """Yield the batches of all epochs of a training loader in this process.

    Args:
        data: Data set as Ultralytics has read it.
        by_place: True for draws by place.
        arguments: Arguments of the training.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_dataloader, build_yolo_dataset
    from ultralytics.utils.torch_utils import init_seeds

    from yolov12.training.data.loader import ResumableLoader

    init_seeds(0)
    cfg = get_cfg(overrides={"mode": "train", **arguments})
    stock = build_dataloader(build_yolo_dataset(cfg, data["train"], BATCH, data), BATCH, 0, device="cpu")
    batches = stock.batch_sampler.sampler
    loader: Any = ResumableLoader(stock, cfg.imgsz).take_over()
    if not by_place:
        stock.batch_sampler.sampler, loader = _Unplaced(batches), stock
    while True:
        yield from loader


def cost_part(small: bool) -> dict[str, Any]:
    """Return the CPU milliseconds for one image with and without draws by place.

    Args:
        small: True for few small images.
    """
    import torch
    from ultralytics.data.utils import check_det_dataset

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    numbers = COST if not small else {"images": 16, "imgsz": 64, "batches": 1}
    data = check_det_dataset(photographs(numbers["images"], numbers["imgsz"]))
    found: dict[str, Any] = {"batch": BATCH, **numbers}
    for name, more in CASES.items():
        sources = {
            key: batches_of(data, key == "by place", imgsz=numbers["imgsz"], **more) for key in ("by place", "without")
        }
        runs = {key: lambda source=source: _ms_of_image(source) for key, source in sources.items()}
        ms = rounds.in_turn(runs, numbers["batches"], warm_up=1)  # the first batch fills buffers
        found[name] = {f"{key.replace(' ', '_')}_cpu_ms": statistics.median(times) for key, times in ms.items()}
        found[name]["ratio"] = rounds.median_ratio(ms["by place"], ms["without"])
        print(name, json.dumps(found[name]), flush=True)
    torch.set_num_threads(threads)
    return found


def _ms_of_image(batches: Iterator[Any]) -> float:
    """Return the CPU milliseconds for one image of the next batch."""
    begin = time.process_time()
    images = len(next(batches)["img"])
    return 1000 * (time.process_time() - begin) / images


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {"map": map_part, "cost": cost_part}


def main() -> None:
    """Run the parts, and write the results of each to the file at once."""
    parser = report.parser(__doc__, parts=PARTS)
    parser.add_argument("--small", action="store_true", help="few small images and one epoch, to try the benchmark")
    options = parser.parse_args()
    from yolov12 import autopatch

    autopatch.apply()
    import cv2

    result = report.Report(options.out, "cpu", keep=True, opencv=cv2.__version__)
    for part in options.only:
        result.add(part, PARTS[part](options.small))


if __name__ == "__main__":
    main()
