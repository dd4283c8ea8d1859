"""One of several processes that train together: `python rank.py MODEL ARGUMENTS FOLDER`.

Its rank is in the environment. It saves its weights and the results of validation in the folder. Environment variables,
all of them JSON except VALIDATE:

CLOCK        [seconds, ...]: what passes on each rank's clock whenever the training looks at it
KILL         [rank, batch]: the rank that dies, and the batch after which it does
KILL_IN_VAL  rank that dies in validation
NO_ROOM      [rank, batch]: the rank on which images above 64 pixels do not fit, until this batch
SLOW         [rank, factor]: the rank whose loss takes longer by this factor
STOP         [batch, ...]: batches after which all ranks are interrupted
TAKES        rank on which callbacks take batches from the training's loader
VALIDATE     path of a model whose weights are validated instead of those that were trained
WORKERS      [number, ...]: number of data workers of each rank
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from ultralytics import YOLO
from ultralytics.engine import trainer as upstream
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import unwrap_model

from yolov12.errors import DoesNotFitError
from yolov12.mas import Engine
from yolov12.mas.scheduling.planner import BatchPlanner
from yolov12.training.adapter.detection import DetectionTask
from yolov12.training.data.loader import ResumableLoader


def leave_no_room(while_):
    plan, would_fit = BatchPlanner.plan, Engine.would_fit

    def planned(planner, start, failure):
        if while_() and planner._work.width > 64:
            raise DoesNotFitError("more than there is")
        return plan(planner, start, failure)

    def fits(engine, height, width, *, whole_group):
        if while_() and width > 64:
            return engine._ranks.all(False)
        return would_fit(engine, height, width, whole_group=whole_group)

    BatchPlanner.plan, Engine.would_fit = planned, fits


def load_with(workers):
    """Use data workers on the CPU, where Ultralytics uses none."""
    stock = DetectionTrainer.get_dataloader

    def get_dataloader(trainer, *args, **options):
        trainer.args.workers = workers
        return stock(trainer, *args, **options)

    DetectionTrainer.get_dataloader = get_dataloader


def dies_in(validator):
    validator.callbacks["on_val_start"].append(lambda _: os.kill(os.getpid(), signal.SIGKILL))


def main(name, arguments, folder):
    rank = int(os.environ.get("RANK", "-1"))
    model = YOLO(name)
    losses, rates, images = [], [], []
    done = 0
    take = ResumableLoader._take

    def taken(loader):
        batch, times = take(loader)
        images.append([Path(file).relative_to(Path(file).parents[2]).as_posix() for file in batch["im_file"]])
        return batch, times

    ResumableLoader._take = taken

    def batch_ends(trainer):
        nonlocal done
        done += 1
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        if done in json.loads(os.environ.get("STOP", "[]")):
            raise KeyboardInterrupt
        losses.append({key: float(value) for key, value in trainer.loss_items.items()})
        victim, after = json.loads(os.environ.get("KILL", "[-2, 0]"))
        if rank == victim and done == after and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    def epoch_ends(trainer):
        trainer.ema.ema.load_state_dict(YOLO(os.environ["VALIDATE"]).model.float().state_dict())

    model.add_callback("on_train_batch_end", batch_ends)
    if rank == int(os.environ.get("TAKES", "-1")) >= 0:
        for event in ("on_train_start", "on_train_batch_end", "on_train_epoch_end"):
            model.add_callback(event, lambda trainer: next(iter(trainer.train_loader))["img"])
    slow, times = json.loads(os.environ.get("SLOW", "[-2, 1]"))
    if rank == slow:
        loss = DetectionTask.loss

        def slower(task, model, part):
            began = time.perf_counter()
            found = loss(task, model, part)
            time.sleep((times - 1) * (time.perf_counter() - began))
            return found

        DetectionTask.loss = slower
    crowded, until = json.loads(os.environ.get("NO_ROOM", "[-2, 0]"))
    if rank == crowded:
        leave_no_room(lambda: done < until)
    if "CLOCK" in os.environ:
        seconds = itertools.count(0, json.loads(os.environ["CLOCK"])[rank])
        upstream.time = SimpleNamespace(time=lambda: next(seconds))
    if "WORKERS" in os.environ:
        load_with(json.loads(os.environ["WORKERS"])[rank])
    if rank == int(os.environ.get("KILL_IN_VAL", "-2")):
        model.add_callback("on_train_epoch_end", lambda trainer: dies_in(trainer.validator))
    if "VALIDATE" in os.environ:
        model.add_callback("on_train_epoch_end", epoch_ends)
    model.train(**arguments)
    trainer = model.trainer
    torch.save(
        {
            "weights": {name: value.clone() for name, value in unwrap_model(trainer.model).state_dict().items()},
            "ema": trainer.ema.ema.state_dict(),
            "losses": losses,
            "rates": rates,
            "images": images,
            "metrics": {name: float(value) for name, value in (trainer.metrics or {}).items()},
            "folder": str(trainer.save_dir),
        },
        folder / f"{max(rank, 0)}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
