"""Training in several processes: the process group, and the changes to Ultralytics in each of its processes.

Ultralytics starts one process per GPU for `device=0,1`. `torchrun` starts any number, on one machine or several. Both
tell each process its rank in environment variables. Ultralytics' training loop stays as it is, and its collectives use
the group that is created here. Two things of Ultralytics are not used: DistributedDataParallel, and the sampler that
gives each process a fixed part of the data.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch
import torch.distributed as dist
from torch import nn

from yolov12 import own_files
from yolov12.errors import ConfigError, RankError
from yolov12.mas.distributed.ranks import ProcessRanks, exchange_names
from yolov12.mas.distributed.watchdog import Watchdog, connect, meet, telling
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
"""Timeout of a collective, Ultralytics' value: rank 0 may work alone for a long time. The watchdog finds dead ranks."""
_GRACE_S = 15.0
"""Seconds in which a process has to save and end after another process is gone.

It cannot save while its device waits for the dead process.
"""


@dataclass(frozen=True)
class ProcessGroup:
    """Processes of one training, as one of them sees them."""

    device: torch.device
    """Device of this process."""
    shares_device: bool
    """True if another process of this machine has the same device."""
    watchdog: Watchdog
    """Finds a rank that is gone."""
    ranks: ProcessRanks
    """Collectives of the engine."""


def _join_group(argument: Any, training: int) -> ProcessGroup:
    """Join torch.distributed's default group, and meet the other processes of a training.

    Args:
        argument: Value of Ultralytics' argument `device`.
        training: Number of trainings of this process so far, which distinguishes their watchdogs.
    """
    from ultralytics.utils import RANK, WORLD_SIZE

    device, shares_device = _place(argument)
    if not dist.is_initialized():
        # NCCL refuses two processes on one device.
        gloo = device.type == "cpu" or shares_device
        backend = "gloo" if gloo else "cpu:gloo,cuda:nccl"
        with telling():
            store, rank, size = meet(_TIMEOUT)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    names = exchange_names()
    watchdog = Watchdog(connect(str(training)), RANK, WORLD_SIZE, names=names, grace_s=_GRACE_S)
    kinds: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(kinds, torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return ProcessGroup(device, shares_device, watchdog, ProcessRanks(watchdog, alike=len(set(kinds)) == 1))


_group: ProcessGroup | None = None
_trainings = 0


def current() -> ProcessGroup | None:
    """Return the process group of the current training; None for one process, or without the engine."""
    return _group


def check_batch(settings: Mapping[str, Any], processes: int) -> None:
    """Check that every process has a part of a batch.

    Args:
        settings: Arguments of the training; `batch` and `bn_group` are used.
        processes: Number of processes that share each batch.

    Raises:
        ConfigError: A batch has fewer images or BatchNorm groups than processes, or its size is not given.
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
    """Run Ultralytics' `BaseTrainer.__init__`; for several processes, create the process group first.

    Args:
        stock_init: Ultralytics' own method.
        trainer: Trainer that it initialises.
        args: Positional arguments for `stock_init`.
        kwargs: Keyword arguments for `stock_init`.

    Raises:
        ConfigError: The processes cannot share a batch, see `check_batch`.
    """
    global _group, _trainings
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import RANK, WORLD_SIZE
    from ultralytics.utils.torch_utils import init_seeds

    given = inspect.signature(stock_init).bind(trainer, *args, **kwargs)
    given.apply_defaults()
    settings = {**vars(get_cfg(given.arguments["cfg"])), **(given.arguments["overrides"] or {})}
    processes = WORLD_SIZE if RANK != -1 else _devices(settings.get("device"))
    shared = processes > 1 and settings.get("mas", True)
    if shared and not settings.get("resume"):
        check_batch(settings, processes)
    if RANK == -1 or not shared:
        stock_init(trainer, *args, **kwargs)
        return
    _trainings += 1
    _group = _join_group(settings.get("device"), _trainings)
    try:
        stock_init(trainer, *args, **kwargs)
        check_batch(vars(trainer.args), processes)  # a resumed run has its arguments only now
    except BaseException as error:
        disband(error)
        raise
    trainer.device, trainer.world_size = _group.device, _group.ranks.size
    # All processes begin with the same weights and draw the same batches, like one process.
    init_seeds(trainer.args.seed, deterministic=trainer.args.deterministic)


def _devices(argument: Any) -> int:
    """Return the number of devices that Ultralytics' argument `device` asks for, as Ultralytics reads it."""
    from ultralytics.utils.torch_utils import parse_device

    # Each -1 is an idle GPU. Ultralytics chooses them later, and only once.
    named = parse_device(argument if isinstance(argument, torch.device) else str(argument).replace("-1", "0"))
    return len(named.split(","))


def launch(stock_train: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `BaseTrainer.train`. For several GPUs, it starts one process per GPU and waits for them.

    Args:
        stock_train: Ultralytics' own method.
        trainer: Ultralytics trainer.

    Raises:
        RankError: One of the processes failed.
        SystemExit: SIGTERM arrived and was passed on to the processes.
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
        with own_files.shared():  # the checkpoints are rank 0's, and this process reads them
            stock_train(trainer)
    except subprocess.CalledProcessError as error:
        if stopped:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise RankError(f"a process of the training failed (exit status {error.returncode}): see above") from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, stock_handler)


def disband(error: BaseException | None = None) -> None:
    """Leave the process group at the end of a training.

    Args:
        error: Error that ends the training; the other processes get its text. None if the training is complete.
    """
    global _group
    if _group is not None and error is not None:
        stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
        _group.watchdog.leaving("was asked to stop" if stopped else str(error) or type(error).__name__)
    elif _group is not None:
        _group.watchdog.close()
    _group = None


def one_folder(get_save_dir: Callable[..., Path], /, args: Any, *more: Any, **others: Any) -> Path:
    """Run Ultralytics' `get_save_dir`, which finds a free name. In a training, rank 0 runs it for all processes.

    Args:
        get_save_dir: Ultralytics' own function.
        args: Arguments of the run.
        more: Further positional arguments for `get_save_dir`.
        others: Keyword arguments for `get_save_dir`.
    """
    if _group is None or getattr(args, "mode", None) != "train":
        return get_save_dir(args, *more, **others)
    box = [str(get_save_dir(args, *more, **others)) if _group.ranks.rank == 0 else None]
    dist.broadcast_object_list(box, 0)
    return Path(str(box[0]))


def setup_group(stock_setup: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `_setup_ddp`, unless the process group exists already. All ranks then trust rank 0's files.

    Args:
        stock_setup: Ultralytics' own method.
        trainer: Ultralytics trainer.
    """
    if _group is None:
        stock_setup(trainer)
    else:
        from ultralytics.utils.torch_utils import get_torch_device_backend

        trainer.device = _group.device
        if _group.device.type != "cpu":
            trainer.accelerator = get_torch_device_backend(_group.device)
    notes = [own_files.share() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(notes, 0)
    own_files.join(notes[0])


@contextmanager
def setting_up(ours: Callable[[nn.Module], str | None]) -> Iterator[None]:
    """Return the context of Ultralytics' `_setup_train`: without DistributedDataParallel if the engine trains.

    Args:
        ours: Returns the reason why the engine does not train a model, or None if it does.

    Raises:
        ConfigError: The engine does not train the model, and processes have no GPUs of their own.
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
    """Run Ultralytics' `_build_train_pipeline`, changed if the engine trains in several processes.

    Every process then draws the whole training batches, which are split when they are drawn (see `sharing`). Validation
    batches have the size of an equal share, and Ultralytics distributes them among the processes.

    Args:
        stock_build: Ultralytics' own method.
        trainer: Ultralytics trainer.
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
    """Return the device of this process, and whether another process of this machine uses it, too."""
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
