"""Functions around Ultralytics' trainer: how it is made, set up and run."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from yolov12 import files, own_files
from yolov12.training.adapter import attach as adapter
from yolov12.training.adapter import kernels_ahead
from yolov12.training.adapter.users_code import is_ultralytics
from yolov12.training.classes import head, table
from yolov12.training.data import host, replay, workers
from yolov12.training.run import options, process_group, run_folder, session

__all__ = ["build_loaders", "make", "resume_training", "setup_model", "setup_train", "train"]

_CHANGE = "yolov12_classes"  # attribute of a trainer: how its classes differ from those of its model


def make(stock: Callable[..., None], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
    """Run Ultralytics' `BaseTrainer.__init__` with the other ranks at hand, if there are any.

    Args:
        stock: Ultralytics' own method.
        trainer: The trainer that it makes.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
    """
    with session.no_false_start(trainer), run_folder.locked_while_made():
        process_group.gather(stock, trainer, *args, **kwargs)
        given = inspect.signature(stock).bind(trainer, *args, **kwargs).arguments
        if trainer.args.mas:
            workers.made(trainer, given.get("overrides") or {})


def train(stock: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `BaseTrainer.train`, which for several GPUs starts a process for each.

    Args:
        stock: Ultralytics' own method.
        trainer: Ultralytics' trainer.

    Raises:
        ConfigError: Another training runs in the folder.
    """
    workers.keep_changed(trainer)
    with run_folder.locked(trainer), session.no_false_start(trainer):
        adapter.begin(trainer)
        try:
            process_group.launch(stock, trainer)
        finally:
            adapter.end(trainer)  # a training loop of the user's own may not be Ultralytics' `_do_train`


def setup_model(stock: Callable[..., Any], trainer: Any, /) -> Any:
    """Run Ultralytics' `BaseTrainer.setup_model`, and let the classes of the model keep their weights by name.

    New classes start from the mean of the others, unless the user's own `get_model` has made the model.

    Args:
        stock: Ultralytics' own method.
        trainer: Ultralytics' trainer.

    Returns:
        What `stock` returns: the checkpoint to resume from, or None.
    """
    from ultralytics.utils import LOGGER

    checkpoint = stock(trainer)
    # A user's own code may call this with arguments that Ultralytics' configuration has not made.
    if getattr(trainer.args, "mas", False) and trainer.args.cls_remap and not trainer.resume:
        change = head.keep_by_name(trainer.model, trainer.data.get("names"), trainer.args.rename)
        setattr(trainer, _CHANGE, change)
        if change is not None and not change.knows_none and is_ultralytics(trainer.get_model):
            head.start_new(trainer.model, change)
        if change is not None and not change.is_none:
            LOGGER.log(logging.WARNING if change.knows_none else logging.INFO, f"classes: {change}")
            if change.hint is not None:
                LOGGER.info(f"classes: a class that was only renamed keeps its weights with {change.hint}")
    return checkpoint


def setup_train(stock: Callable[..., None], trainer: Any, /, *args: Any, **kwargs: Any) -> None:
    """Run Ultralytics' `BaseTrainer._setup_train`, then let the engine run this trainer's batches.

    Args:
        stock: Ultralytics' own method.
        trainer: Ultralytics' trainer.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
    """
    if trainer.args.mas:
        options.check_data_arguments(vars(trainer.args))  # a trainer may have been made without `Model.train`
        workers.begin(trainer)
        host.limit_workers(trainer)
    with process_group.setting_up(functools.partial(adapter.why_not, trainer)):
        stock(trainer, *args, **kwargs)
    if trainer.args.mas:
        host.limit_prefetch(trainer)
        table.begin(trainer, getattr(trainer, _CHANGE, None), wanted=trainer.args.replay is not None)
    files.make_atomic(trainer)
    if not is_ultralytics(trainer.save_model):
        trainer.save_model = functools.partial(_save_model, trainer, trainer.save_model)
    adapter.attach(trainer)


def build_loaders(stock: Callable[..., None], trainer: Any, /) -> None:
    """Run Ultralytics' `BaseTrainer._build_train_pipeline` with as many workers as the memory of the host allows.

    Meanwhile, other processes begin to compile kernels. Only here, the batch of `batch=-1` or `batch=0.7` and the image
    size of a list are known.

    Args:
        stock: Ultralytics' own method.
        trainer: Ultralytics' trainer.
    """
    if trainer.args.mas:
        host.limit_workers(trainer)
        kernels_ahead.begin(trainer)
    with replay.mixed(trainer), host.data_room(trainer) if trainer.args.mas else nullcontext():
        process_group.build_loaders(stock, trainer)


def resume_training(stock: Callable[..., None], trainer: Any, /, ckpt: Any) -> None:
    """Run Ultralytics' `BaseTrainer.resume_training`, or find the state of a later step to resume from.

    Args:
        stock: Ultralytics' own method.
        trainer: Ultralytics' trainer.
        ckpt: Checkpoint of an epoch's end, or None.
    """
    adapter.resume(stock, trainer, ckpt)


def _save_model(trainer: Any, users: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a `save_model` of the user's own, and trust the checkpoints that it writes."""
    with own_files.written(trainer.last, trainer.best):
        return users(*args, **kwargs)
