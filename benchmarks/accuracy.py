"""Accuracy of whole trainings: stock Ultralytics, and this package with larger batches and beside a neighbour.

    python -m benchmarks accuracy --out benchmarks/results/accuracy.json --runs runs/accuracy     (an hour on one H200)
    python -m benchmarks accuracy --out part.json --only stock 256 --data hard --seconds 550      (some of it)
    python -m benchmarks accuracy --out part.json --stock-batch s=24 n=32                         (without trials)
    python -m benchmarks accuracy --out part.json --device cpu --only stock 256 stock256 nbs256   (an hour on two cores)
    python -m benchmarks accuracy --out part.json --device cpu --small                            (a minute, to try it)

A second call with the same files goes on where the first one ended: what the JSON file has is not trained again.

Variants. A training has the arguments of `Settings`, and otherwise Ultralytics' defaults. What `optimizer=auto` would
choose is given as arguments: AdamW with a learning rate that does not depend on the batch.

    stock      Ultralytics at the largest batch at which no allocation fails under the limit. It updates the weights
               once for about nbs=64 images, so for several batches, or for a batch if that is larger
    same       this package with the same arguments
    256        this package with batch=256 under the same limit, bn_group=auto. An update has 256 images, so there are
               a quarter as many of them. Ultralytics scales the weight decay by batch / nbs, so to four times
    neighbour  the same, and other processes use the same memory: all trainings of this variant run at the same time
               in a pool that has room for their limits, of which benchmarks/neighbour.py takes and releases a part
    stock256   Ultralytics with batch=256 and no limit, as on a card that is large enough
    nbs256     Ultralytics at its largest batch with nbs=256, so with as many images in an update as `256`
    256lr      `256` with the usual scaling for Adam: the learning rate times the square root of 256 / nbs
    device     `256` with images that are augmented on the device; in all others, they are augmented on the host

On a GPU, models start from one base model of their size, which Ultralytics has trained for a short time on other
boards, and images have 320 pixels under a limit of 4 GiB, which is as much for a pixel as 16 GiB at 640. Many
trainings run at the same time on the card, through NVIDIA's Multi-Process Service where the driver has it, and those
with large batches stand back for the others on the host. So their times say nothing about speed. Data `demo` are the
boards of `data=demo`, `hard` are fewer boards with more panels, less contrast and noise; see `drawings.inspection`.

On a CPU, the model and the data are those of benchmarks/partners.py, and models start from random weights. Batches are
a quarter as large (64 for 256, nbs=16), and stock's has 16 images. There is no limit; micro-batches have 16 images.

`map` of a training is the mAP50-95 on held-out images after each epoch, of the averaged weights, and `map_so_far` that
of one that the time budget cut off: a later call trains it again. `table` has the last epochs of each variant: mean,
standard deviation over seeds, and for this package's variants the difference to the means of stock's three, with half
the width of its 95 % confidence interval (Welch).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import drawings, neighbour
from benchmarks.accuracy_runs import Job, at_once, largest_stable
from benchmarks.accuracy_settings import (
    CONTEXT_GIB,
    CPU,
    GPU,
    LARGE,
    NEIGHBOUR,
    NICENESS,
    SMALL,
    STOCK,
    VARIANTS,
    Settings,
)
from benchmarks.accuracy_table import name_of, table, with_row
from benchmarks.common import report
from benchmarks.common.processes import Call, gpu_shared
from benchmarks.partners import MODEL


class Accuracy:
    """The trainings of one part of the JSON file.

    Args:
        settings: Sizes.
        folder: Folder for data, base models and trainings.
        most: Number of trainings that run at the same time.
        seconds_left: Returns the seconds until the end of the time budget.
    """

    def __init__(self, settings: Settings, folder: Path, most: int, seconds_left: Callable[[], float]) -> None:
        self._settings, self._folder, self._most, self._seconds_left = settings, folder, most, seconds_left

    def data(self, kind: str) -> str:
        """Draw a data set unless it is there, and return its yaml."""
        settings = self._settings
        images = settings.images // (2 if kind == "hard" else 1)
        # As many images for every kind, so hard ones twice as often.
        repeat = settings.images * settings.passes // settings.epochs // images
        if kind == "shapes":
            file = drawings.shapes(images, settings.val, settings.imgsz, self._folder / kind, repeat=repeat)
        else:
            seed, hard = (1 if kind == "base" else 0), kind == "hard"
            where = (self._folder / kind, images, settings.val, settings.imgsz)
            file = drawings.inspection(*where, repeat=repeat, seed=seed, hard=hard)
        Call("accuracy_runs:scan", stock=True, data=file).result()
        return file

    def bases(self, models: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Train the base models that are not there, and yield their rows."""
        missing = [model for model in models if not self._base(model).exists()] if self._settings.base_epochs else []
        if missing:
            own = {"epochs": self._settings.base_epochs, "batch": 128, "workers": 6, "seed": 99}
            own |= {"data": self.data("base"), "project": str(self._folder)}
            jobs = []
            for model in missing:
                arguments = {**self._settings.arguments(), **own, "name": f"base-{model}"}
                call = {"model": f"yolo12{model}.yaml", "limit_gib": None, "niceness": 0, "arguments": arguments}
                jobs.append(Job({"data": "base", "model": model, "variant": "base"}, True, call))
            for row, _ in at_once(jobs, len(jobs), self._seconds_left):
                yield row
                (self._folder / f"base-{row['model']}" / "weights" / "last.pt").rename(self._base(row["model"]))

    def _base(self, model: str) -> Path:
        return self._folder / f"base-{model}.pt"

    def starts(self, models: Sequence[str]) -> dict[str, str]:
        """Return what each model starts from; a model whose base is not there is left out."""
        if self._settings.base_epochs:
            return {model: str(self._base(model)) for model in models if self._base(model).exists()}
        tiny = self._folder / "tiny.yaml"
        tiny.write_text(MODEL)
        return {model: str(tiny) if model == "tiny" else f"yolo12{model}.yaml" for model in models}

    def trials(self, kinds: Sequence[str], starts: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Try stock's batches for an epoch each, and yield a row for each model and data set.

        Raises:
            SystemExit: No batch was found for one of them, after the rows of the others.
        """
        jobs = [
            self.job(kind, model, "stock", 0, starts[model], batch, trial=True)
            for model, kind, batch in itertools.product(starts, kinds, self._settings.candidates)
        ]
        rows = [row for row, _ in at_once(jobs, self._most, self._seconds_left)]
        failures = []
        for model, kind in itertools.product(starts, kinds):
            mine = [row for row in rows if (row["model"], row["data"]) == (model, kind)]
            if len(mine) == len(self._settings.candidates):
                try:
                    batch = largest_stable(mine)
                except RuntimeError as error:
                    failures.append(f"{model}, {kind}: {error}")
                else:
                    yield {"model": model, "data": kind, "batch": batch, "trials": mine}
        if failures:
            raise SystemExit("\n".join(failures))

    def job(
        self, kind: str, model: str, variant: str, seed: int, start: str, stock_batch: int, trial: bool = False
    ) -> Job:
        """Return one training.

        Args:
            kind: Name of the data.
            model: Name of the model.
            variant: One of `VARIANTS`.
            seed: Seed of the training.
            start: Yaml or weights that it starts from.
            stock_batch: Batch of stock.
            trial: True for a single epoch, of which no weights are saved. Its end is validated, as Ultralytics always
                validates the last epoch.
        """
        settings, is_stock = self._settings, variant in STOCK
        name = {"data": kind, "model": model, "variant": variant, "seed": seed}
        arguments = {**settings.arguments(), "data": str(self._folder / kind / "data.yaml"), "seed": seed}
        arguments["batch"] = settings.large if variant in LARGE else stock_batch
        if variant == "nbs256":
            arguments["nbs"] = settings.large
        if variant == "256lr":
            arguments["lr0"] *= math.sqrt(settings.large / settings.nbs)
        if not is_stock:
            limit = {"mem_limit": f"{settings.limit_gib:g}GiB"} if settings.limit_gib else {"micro_batch": stock_batch}
            place = "device" if variant == "device" else "host"
            arguments |= {"recipe": False, "augment_on": place, **limit}
        if trial:
            arguments |= {"epochs": 1, "val": False, "save": False}
            name["batch"] = stock_batch
        words = "-".join(map(str, name.values()))
        arguments |= {"project": str(self._folder / "trainings"), "name": words}
        limit_gib = settings.limit_gib if variant in ("stock", "nbs256") else None
        return Job(
            {**name, "batch": arguments["batch"], "nbs": arguments["nbs"], "lr0": arguments["lr0"]},
            is_stock,
            {
                "model": start,
                "limit_gib": limit_gib,
                "niceness": NICENESS if variant in LARGE else 0,  # fewer steps: they would end long before the others
                "arguments": arguments,
            },
        )

    def run(self, jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
        """Run trainings and yield their rows; those with a neighbour after the others, all at the same time."""
        for pressed in (False, True):
            mine = [job for job in jobs if (job.name["variant"] == "neighbour") is pressed]
            most = min(len(mine), self._most)
            beside = self._neighbour(most) if pressed and mine else nullcontext()
            with beside:
                for row, _ in at_once(mine, most, self._seconds_left, keep_unfinished=True):
                    yield row

    def _neighbour(self, trainings: int) -> Any:
        limits_mib = 1024 * (self._settings.limit_gib or 0) * trainings
        pool_mib = limits_mib + 1024 * CONTEXT_GIB * trainings
        mib = [round(each) for each in (pool_mib, *(part * limits_mib for part in NEIGHBOUR))]
        return neighbour.beside(self.neighbour_log, self._settings.device, *mib, 0)

    @property
    def neighbour_log(self) -> Path:
        """File of what the neighbour held."""
        return self._folder / "neighbour.log"


def _claim(folder: Path, settings: Settings) -> None:
    """Make the folder of data and trainings, or refuse one whose data have other sizes."""
    file, about = folder / "settings.json", _about(settings)
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text()) != about:
        raise SystemExit(f"{folder} has data and trainings with other settings: give another --runs")
    file.write_text(json.dumps(about))


def _about(settings: Settings) -> dict[str, Any]:
    """Return the settings that all trainings share, as JSON has them."""
    about: dict[str, Any] = json.loads(json.dumps(asdict(replace(settings, models=(), data=()))))
    return about


def _pair(text: str) -> tuple[str, int]:
    model, _, batch = text.partition("=")
    return model, int(batch)


def main() -> None:
    """Draw, train, and write the JSON file after each training."""
    parser = report.parser(__doc__, parts=VARIANTS, small="16 images and one epoch, with --device cpu")
    parser.add_argument("--models", nargs="+", help="scales of YOLO12; tiny is a model of eleven layers")
    parser.add_argument("--data", nargs="+", choices=("hard", "demo", "shapes"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", help="name in the JSON file; by default, gpu or cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time budget of this call")
    parser.add_argument("--at-once", type=int, default=12, help="trainings that run at the same time")
    parser.add_argument(
        "--stock-batch", nargs="+", type=_pair, default=[], help="batches of stock, found earlier: s=32"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder of data and trainings")
    parser.add_argument("--prepare", action="store_true", help="stop after data, base models and trials of batches")
    for name in ("imgsz", "images", "passes", "epochs", "base-epochs"):
        parser.add_argument(f"--{name}", type=int, help="instead of that of the settings")
    parser.add_argument("--limit-gib", type=float, help="instead of that of the settings")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    settings = (SMALL if options.small else CPU) if options.device == "cpu" else GPU
    given = ("models", "data", "imgsz", "images", "passes", "epochs", "base_epochs", "limit_gib")
    changed = {name: value for name in given if (value := getattr(options, name)) is not None}
    settings = replace(settings, **{name: tuple(v) if isinstance(v, list) else v for name, v in changed.items()})
    accuracy = Accuracy(settings, options.runs.absolute(), options.at_once, lambda: end - time.monotonic())
    part = options.part or ("cpu" if options.device == "cpu" else "gpu")
    result = report.Report(options.out, options.device, keep=True)
    with gpu_shared() if options.device != "cpu" else nullcontext(False) as shared:
        carry_out(options, settings, accuracy, result, part, shared)


def carry_out(
    options: argparse.Namespace,
    settings: Settings,
    accuracy: Accuracy,
    result: report.Report,
    part: str,
    shared: bool = False,
) -> None:
    """Run what the part does not have yet, and write it after each training.

    Args:
        options: Options of the command.
        settings: Sizes.
        accuracy: The trainings.
        result: The JSON file.
        part: Name of the part in the file.
        shared: Whether NVIDIA's Multi-Process Service runs.
    """
    found = result.get(part) or {"stock_batch": [], "runs": [], "neighbour_mib": []}
    about = _about(settings)
    if found.setdefault("settings", about) != about:
        raise SystemExit(f"{options.out} has a part {part} with other settings: give another --part")
    _claim(options.runs, settings)
    for kind in settings.data:
        accuracy.data(kind)
    for row in accuracy.bases(settings.models):
        print(json.dumps(row), flush=True)
        found.setdefault("base", []).append(row)
        result.add(part, found)
    starts = accuracy.starts(settings.models)
    known = {(row["model"], row["data"]): row["batch"] for row in found["stock_batch"]}
    known |= {(model, kind): batch for model, batch in options.stock_batch for kind in settings.data}
    if len(settings.candidates) == 1:
        known |= dict.fromkeys(itertools.product(starts, settings.data), settings.candidates[0])
    for kind in settings.data:
        missing = {model: start for model, start in starts.items() if (model, kind) not in known}
        for row in accuracy.trials([kind], missing):
            print(json.dumps(row), flush=True)
            found["stock_batch"].append(row)
            known[row["model"], row["data"]] = row["batch"]
            result.add(part, found)
        if options.prepare:
            continue
        done = [name_of(row) for row in found["runs"] if "map" in row]
        jobs = [
            accuracy.job(kind, model, variant, seed, start, batch)
            for seed, (model, start), variant in itertools.product(options.seeds, starts.items(), options.only)
            if (kind, model, variant, seed) not in done and (batch := known.get((model, kind)))
        ]
        for row in accuracy.run(jobs):
            print(json.dumps(row), flush=True)
            found["runs"] = with_row(found["runs"], {**row, "mps": shared})
            found["table"] = table(found["runs"])
            result.add(part, found)
        if any(job.name["variant"] == "neighbour" for job in jobs) and accuracy.neighbour_log.exists():
            found["neighbour_mib"].append(neighbour.held(accuracy.neighbour_log))
            result.add(part, found)
    print(json.dumps(found.get("table"), indent=1))


if __name__ == "__main__":
    main()
