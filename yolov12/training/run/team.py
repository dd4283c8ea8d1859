"""Trainings in several processes: how these find each other, and what Ultralytics does otherwise in each of them.

Ultralytics starts one process a GPU for `device=0,1`, and `torchrun` any number, on one machine or several; either way
each finds its place in the environment. Ultralytics' loop stays as it is, and its collectives run in the group that is
made here. What it would do to gradients and batches is left out: DistributedDataParallel, and a fixed part of the data
for each process.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch
import torch.distributed as dist
from torch import nn

from yolov12.errors import ConfigError, RankError
from yolov12.mas.distributed.ranks import ProcessRanks, exchange_names
from yolov12.mas.distributed.watchdog import Watchdog, connect
from yolov12.mas.scheduling.groups import split_groups

__all__ = [
    "ProcessGroup",
    "build_loaders",
    "check_batch",
    "current",
    "disband",
    "gather",
    "launch",
    "one_folder",
    "setting_up",
    "setup_group",
]

_TIMEOUT = timedelta(hours=3)
"""Of a collective, as Ultralytics has it: rank 0 may be long at what it does alone. Of the dead, the watchdog tells."""
_GRACE_S = 15.0
"""For a process to save and end once another is gone; one whose device waits for the dead cannot."""


class ProcessGroup:
    """The processes of one training, seen from one of them.

    Args:
        device: Ultralytics' argument.
        training: Counts the trainings of this process.
    """

    def __init__(self, device: Any, training: int) -> None:
        from ultralytics.utils import RANK, WORLD_SIZE

        self.device, self.shares_device = _place(device)
        if not dist.is_initialized():
            # NCCL refuses two processes on one device.
            gloo = self.device.type == "cpu" or self.shares_device
            dist.init_process_group("gloo" if gloo else "cpu:gloo,cuda:nccl", timeout=_TIMEOUT)
        names = exchange_names()
        self.watchdog = Watchdog(connect(str(training)), RANK, WORLD_SIZE, names=names, grace_s=_GRACE_S)
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        kinds: list[Any] = [None] * WORLD_SIZE
        dist.all_gather_object(kinds, kind)
        self.ranks = ProcessRanks(self.watchdog, alike=len(set(kinds)) == 1)


_group: ProcessGroup | None = None
_trainings = 0


def current() -> ProcessGroup | None:
    """The team of the training that this process takes part in; None where it trains alone, or without the engine."""
    return _group


def check_batch(settings: Mapping[str, Any], processes: int) -> None:
    """Refuse a batch that leaves a process without work.

    Args:
        settings: Of the training.
        processes: That share each batch.

    Raises:
        ConfigError: There are too few images, or groups of them, or their number is still to be found.
    """
    batch, group = settings.get("batch", 16), settings.get("bn_group")
    if batch < 1 or not float(batch).is_integer():
        raise ConfigError(f"batch={batch}: for several processes give a number of images; any number will fit")
    if batch < processes:
        raise ConfigError(f"batch={batch} is less than an image for each of {processes} processes")
    if isinstance(group, int) and group and len(split_groups(int(batch), group)) < processes:
        raise ConfigError(
            f"bn_group={group}: batch={batch} has fewer groups than the {processes} processes that share it: "
            f"give {int(batch) // processes} or less, or leave it out"
        )


def gather(stock_init: Callable[..., None], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
    """Run Ultralytics' `BaseTrainer.__init__`, with the other processes at hand where there are some.

    Args:
        stock_init: Ultralytics' own method.
        trainer: What it makes.
        args: Positional arguments for `stock_init`.
        kwargs: Keyword arguments for `stock_init`.
    """
    global _group, _trainings
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import RANK, WORLD_SIZE
    from ultralytics.utils.torch_utils import init_seeds

    given = inspect.signature(stock_init).bind(trainer, *args, **kwargs)
    given.apply_defaults()
    settings = {**vars(get_cfg(given.arguments["cfg"])), **(given.arguments["overrides"] or {})}
    processes = WORLD_SIZE if RANK != -1 else str(settings.get("device")).count(",") + 1  # "0,1", [0, 1]
    shared = processes > 1 and settings.get("mas", True)
    if shared and not settings.get("resume"):
        check_batch(settings, processes)
    if RANK == -1 or not shared:
        stock_init(trainer, *args, **kwargs)
        return
    _trainings += 1
    _group = ProcessGroup(settings.get("device"), _trainings)
    try:
        stock_init(trainer, *args, **kwargs)
        check_batch(vars(trainer.args), processes)  # of a run that is resumed
    except BaseException as error:
        disband(error)
        raise
    trainer.device, trainer.world_size = _group.device, _group.ranks.size
    # As in one process: weights begin alike, and loaders draw the same batches.
    init_seeds(trainer.args.seed, deterministic=trainer.args.deterministic)


def launch(stock_train: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `BaseTrainer.train`, which for several GPUs starts a process for each and waits for them.

    Args:
        stock_train: Ultralytics' own method.
        trainer: Of Ultralytics.

    Raises:
        RankError: One of the processes failed.
        SystemExit: SIGTERM came, which is handed on.
    """
    if not trainer.ddp:
        stock_train(trainer)
        return
    stopped = False

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        for child in psutil.Process().children():
            child.send_signal(number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    stock_handler = signal.signal(signal.SIGTERM, hand_on) if in_main_thread else None
    try:
        stock_train(trainer)
    except subprocess.CalledProcessError as error:
        if stopped:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise RankError(f"a process of the training failed (exit status {error.returncode}): see above") from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, stock_handler)


def disband(error: BaseException | None = None) -> None:
    """The training is over, or ends with an error, of which the others are told."""
    global _group
    if _group is not None and error is not None:
        stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
        _group.watchdog.leaving("was asked to stop" if stopped else str(error) or type(error).__name__)
    elif _group is not None:
        _group.watchdog.close()
    _group = None


def one_folder(get_save_dir: Callable[..., Path], /, args: Any, *more: Any, **others: Any) -> Path:
    """Run Ultralytics' `get_save_dir`, which counts up to a free name; of a training once for all processes."""
    if _group is None or getattr(args, "mode", None) != "train":
        return get_save_dir(args, *more, **others)
    box = [str(get_save_dir(args, *more, **others)) if _group.ranks.rank == 0 else None]
    dist.broadcast_object_list(box, 0)
    return Path(str(box[0]))


def setup_group(stock_setup: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `_setup_ddp`, unless the group is there already."""
    if _group is None:
        stock_setup(trainer)
        return
    from ultralytics.utils.torch_utils import get_torch_device_backend

    trainer.device = _group.device
    if _group.device.type != "cpu":
        trainer.accelerator = get_torch_device_backend(_group.device)


@contextmanager
def setting_up(ours: Callable[[nn.Module], str | None]) -> Iterator[None]:
    """Around Ultralytics' `_setup_train`: no DistributedDataParallel where the engine trains.

    Args:
        ours: Says why it does not train a model; None where it does.
    """
    if _group is None:
        yield
        return
    group, stock = _group, nn.parallel.DistributedDataParallel

    def instead(model: nn.Module, **options: Any) -> nn.Module:
        nn.parallel.DistributedDataParallel = stock  # type: ignore[misc]
        reason = ours(model)
        if reason is None:
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.detach(), 0)
            return model
        if group.device.type == "cpu" or group.shares_device:
            raise ConfigError(f"{reason}: then each process needs a GPU of its own")
        disband()
        return stock(model, **options)

    nn.parallel.DistributedDataParallel = instead  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel = stock  # type: ignore[misc]


def build_loaders(stock_build: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `_build_train_pipeline`; for several processes that the engine trains with whole batches.

    Training batches are cut as they are drawn (see `sharing`). Those of validation are as large as a share, and dealt
    out.
    """
    if _group is None:
        stock_build(trainer)
        return
    get, size = trainer.get_dataloader, trainer.world_size

    def loader(path: Any, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        if mode == "train":
            return get(path, batch_size=batch_size, rank=-1, mode=mode)
        return get(path, batch_size=max(batch_size // size, 1), rank=rank, mode=mode)

    trainer.get_dataloader, trainer.world_size = loader, 1
    try:
        stock_build(trainer)
    finally:
        trainer.world_size = size
        del trainer.get_dataloader
    images = len(trainer.train_loader.dataset)
    if images < trainer.batch_size:
        check_batch({**vars(trainer.args), "batch": images}, size)


def _place(argument: Any) -> tuple[torch.device, bool]:
    """This process's device, and whether another process of this machine has it too."""
    from ultralytics.utils import LOCAL_RANK
    from ultralytics.utils.torch_utils import parse_device

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    named = parse_device("" if argument is None else argument)
    if named == "cpu" or (not named and not torch.cuda.is_available()):
        return torch.device("cpu"), processes > 1
    devices = [int(index) for index in named.split(",")] if named else [*range(torch.cuda.device_count())]
    device = torch.device("cuda", devices[LOCAL_RANK % len(devices)])
    torch.cuda.set_device(device)
    return device, processes > len(devices)
