"""Connection of a trainer to the engine: attach the engine, resume a run, and run the training loop to its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from yolov12.errors import DataError, YOLOv12Error
from yolov12.mas import Advice, Config, Engine, Journal, compile_ahead
from yolov12.mas.config import DEFAULTS
from yolov12.mas.distributed.ranks import ALONE, Ranks
from yolov12.models.activations import activations, unshare
from yolov12.models.layer_names import layer_names
from yolov12.training.adapter.detection import DetectionTask, criterion_of, knows_loss
from yolov12.training.adapter.known import why_not_split
from yolov12.training.adapter.memory_needs import optimizer_bytes, ways_out
from yolov12.training.adapter.trainer import RUNS, SAVER, TrainerAdapter
from yolov12.training.adapter.users_code import is_ultralytics
from yolov12.training.data.loader import ResumableLoader, resumable
from yolov12.training.data.random_state import random_state
from yolov12.training.data.resolution import ResolutionControl, resolution_steps
from yolov12.training.run import process_group
from yolov12.training.run.completed_epoch import CompletedEpoch
from yolov12.training.run.first_checkpoint import RESUMED
from yolov12.training.run.result_rows import drop_rows
from yolov12.training.run.saved_state import FILE, find

__all__ = ["STATE", "attach", "begin", "do_train", "end", "resume", "why_not"]

STATE = "mas_state"
"""Attribute of a trainer, and key of a checkpoint's `optimizer`: state of the engine when the checkpoint was saved."""

_SIZES, _RANDOM = "mas_resolution", "mas_random"  # the same for the resolution control, and for random generators
_FOUND = "yolov12_state"  # attribute of a trainer: the state to resume from
_ENGINE = "yolov12_engine"  # attribute of a trainer


def attach(trainer: Any) -> None:
    """Let the engine run a trainer's batches, unless `mas=False` or the engine does not support the training.

    Args:
        trainer: Ultralytics trainer that has just been set up.

    Raises:
        ConfigError: A setting of the engine is not valid, or the training cannot be shared among processes.
    """
    from ultralytics.utils import LOGGER, USER_CONFIG_DIR

    model = _unwrapped(trainer)
    if not trainer.resume:
        Path(trainer.wdir, FILE).unlink(missing_ok=True)  # it belongs to an earlier run in this folder
    if (reason := why_not(trainer, model)) is not None:
        if trainer.args.mas:
            LOGGER.info(f"memory: {reason}: batches run as Ultralytics runs them")
        if ignored := _ignored(trainer.args):
            LOGGER.warning(f"memory: {reason}, so there is no use for {', '.join(ignored)}")
        return
    unshare(model)
    resolution = _resolution_control(trainer)
    task = DetectionTask(
        resolution.preprocess(trainer.preprocess_batch, trainer.args),
        multi_scale=trainer.args.multi_scale > 0,
        overlapping_masks=trainer.args.overlap_mask,
        only_scales=is_ultralytics(trainer.preprocess_batch),
    )
    group = process_group.current()
    ranks = group.ranks if group is not None else ALONE
    state = getattr(trainer, _FOUND, None)
    Path(trainer.save_dir).mkdir(parents=True, exist_ok=True)  # it may be missing on a machine other than rank 0's
    engine = Engine(
        model,
        task,
        Config.parse(vars(trainer.args)),
        journal=Journal(
            trainer.save_dir,
            resume=bool(trainer.resume),
            steps=state and state["rows"],
            epochs=trainer.start_epoch if state is None else None,
            rank=ranks.rank,
            ranks=ranks.size,
        ),
        backward=lambda loss: trainer.scaler.scale(loss).backward(),
        layers=layer_names(model),
        activations=activations(model),
        advice=Advice(
            ways_out=lambda fraction: ways_out(trainer, fraction),
            optimizer_bytes=lambda: optimizer_bytes(trainer.optimizer, model),
            batches_left=lambda: _batches_left(trainer),
        ),
        cache=USER_CONFIG_DIR / "yolov12-plans",
        ranks=ranks,
        log=LOGGER.info,
    )
    _keep_what_is_learned(trainer, engine, resolution)
    setattr(trainer, _ENGINE, engine)
    if state is not None and state["validated"] is not None:
        placeholders, is_first = state["loader"]["position"], ranks.rank == 0
        CompletedEpoch(trainer, state["validated"], getattr(trainer, _RANDOM), placeholders, is_first=is_first).begin()
    adapter = TrainerAdapter(trainer, model, task, engine, resolution, ranks)
    adapter.take_over_loader()
    adapter.take_over()
    engine.hold_limit()
    if state is not None and adapter.saver is not None:
        if knows_loss(model):
            criterion_of(model)  # its state is restored, and an epoch that is skipped to its end does not create it
        adapter.saver.restore(state)
        delattr(trainer, _FOUND)


def _batches_left(trainer: Any) -> float:
    """Return the number of batches until the end of a training, if nothing ends it early, with the latest one.

    With a loader of the user's own it is unknown: infinity.
    """
    loader = trainer.train_loader
    if not isinstance(loader, ResumableLoader):
        return math.inf
    return float((trainer.epochs - trainer.epoch) * len(loader) - loader.position + 1)


def resume(stock_resume: Callable[..., None], trainer: Any, checkpoint: Any) -> None:
    """Run Ultralytics' `resume_training`, or find a newer state than the checkpoint, which `attach` restores.

    Args:
        stock_resume: Ultralytics' own method.
        trainer: Ultralytics trainer.
        checkpoint: Checkpoint of an epoch's end; None if nothing is resumed.

    Raises:
        DataError: The data set has other classes than the run.
    """
    if not (checkpoint and trainer.resume):
        stock_resume(trainer, checkpoint)
        return
    if trainer.args.mas:
        _check_classes(trainer, checkpoint)
    for name in (STATE, _SIZES, _RANDOM):
        setattr(trainer, name, (checkpoint.get("optimizer") or {}).get(name))
    is_first = checkpoint.get("epoch", -1) == -1 and checkpoint.get("optimizer") is not None
    setattr(trainer, RESUMED, is_first)
    exact = why_not(trainer, _unwrapped(trainer)) is None and resumable(trainer.train_loader)
    state = find(trainer, checkpoint) if exact else None
    if (group := process_group.current()) is not None and not _same_on_all(group.ranks, state):
        state = None
    if state is None and is_first:
        from ultralytics.utils import LOGGER

        LOGGER.warning("resume: no epoch was complete: it begins anew, with the weights of the checkpoint")
        trainer._load_checkpoint_state(checkpoint)
    elif state is None:
        stock_resume(trainer, checkpoint)
    else:
        setattr(trainer, STATE, state["optimizer"].get(STATE))
        setattr(trainer, _FOUND, state)
    if state is None and trainer.args.mas and trainer.metrics is not None:  # rank 0 has metrics
        drop_rows(trainer.csv, trainer.start_epoch)


def _check_classes(trainer: Any, checkpoint: Any) -> None:
    """Refuse data whose classes are not those of the run. One that is only renamed passes."""
    names = getattr(checkpoint.get("ema") or checkpoint.get("model"), "names", None)
    before, now = (
        list(each.values()) if isinstance(each, dict) else each for each in (names, trainer.data.get("names"))
    )
    if not before or not now or before == now:
        return
    if len(before) != len(now):
        reason = f"it has {len(now)} classes, and the run that shall be resumed has {len(before)}"
    elif set(before) == set(now):
        reason = "its classes are in another order than those of the run that shall be resumed"
    else:
        return
    raise DataError(
        f"data={trainer.args.data}: {reason}. Give the data set of the run, or start a new run with "
        f"model={trainer.args.resume} and without resume="
    )


def _same_on_all(ranks: Ranks, state: dict[str, Any] | None) -> bool:
    """Return whether all ranks have found the same state. Ranks without a common folder may not."""
    step = -1
    if state is not None:
        step = 2 * (state["epoch"] * 2**32 + state["loader"]["position"]) + (state["validated"] is not None)
    return ranks.least(step) == -ranks.least(-step)


def do_train(stock_train: Callable[..., Any], trainer: Any) -> Any:
    """Run Ultralytics' `_do_train`. However it ends, save the steps that were done.

    Args:
        stock_train: Ultralytics' own method.
        trainer: Ultralytics trainer.

    Raises:
        RankError: Another rank failed or is gone.
    """
    begin(trainer)
    group = process_group.current()
    try:
        done = stock_train(trainer)
        if group is not None:
            if (saver := getattr(trainer, SAVER, None)) is not None:
                saver.flush()
            group.ranks.all(True)  # the journals of all ranks are complete
        return done
    except BaseException as error:
        if (saver := getattr(trainer, SAVER, None)) is not None:
            saver.save_at_last()
        blamed = group.ranks.blame(error) if group is not None and _is_of_collective(error) else None
        process_group.disband(blamed or error)
        if blamed is not None:
            raise blamed from error
        raise
    finally:
        process_group.disband()
        compile_ahead.end()
        end(trainer)  # at last, as it may call a handler of the user's own, which may raise


def begin(trainer: Any) -> None:
    """Note that a training runs: the engine handles signals until `end`, from when there is a loader.

    Args:
        trainer: Ultralytics trainer.
    """
    setattr(trainer, RUNS, True)
    if (saver := getattr(trainer, SAVER, None)) is not None:
        saver.begin()


def end(trainer: Any) -> None:
    """Release the signals and the limit of the allocator that were taken, unless that was done.

    Args:
        trainer: Ultralytics trainer.
    """
    setattr(trainer, RUNS, False)
    if (engine := getattr(trainer, _ENGINE, None)) is not None:
        engine.lift_limit()  # an error or a signal ends a run without its teardown
    if (saver := getattr(trainer, SAVER, None)) is not None:
        saver.end()


def _is_of_collective(error: BaseException) -> TypeGuard[RuntimeError]:
    """Return whether the error comes from a collective of Ultralytics, such as one in validation."""
    words = "gloo", "NCCL", "Connection closed", "Connection reset"
    by_library = isinstance(error, RuntimeError) and not isinstance(error, YOLOv12Error)
    return by_library and any(word in str(error) for word in words)


def _keep_what_is_learned(trainer: Any, engine: Engine, resolution: ResolutionControl) -> None:
    """Save the states of engine, resolution control and random generators in checkpoints, within the optimizer's state.

    Plain Ultralytics ignores unknown entries there, and drops the optimizer's state when the run is complete.
    """
    states: dict[str, Engine | ResolutionControl] = {STATE: engine, _SIZES: resolution}
    for name, each in states.items():
        if learned := getattr(trainer, name, None):
            each.load_state_dict(learned)
    trainer.optimizer.register_state_dict_post_hook(
        lambda _, state: {
            **state,
            **{name: each.state_dict() for name, each in states.items()},
            _RANDOM: random_state(),
        }
    )


def _unwrapped(trainer: Any) -> nn.Module:
    from ultralytics.utils.torch_utils import unwrap_model

    model: nn.Module = unwrap_model(trainer.model)
    return model


def _resolution_control(trainer: Any) -> ResolutionControl:
    args = trainer.args
    smallest = args.mas_min_imgsz or args.imgsz // 2
    steps = resolution_steps(args.imgsz, smallest, trainer.stride)
    control = ResolutionControl(args.mas_data, steps, trainer.stride)
    control.join(trainer.train_loader.dataset, args)
    return control


def _ignored(args: Any) -> list[str]:
    """Return the engine's arguments that differ from their defaults, as `name=value`."""
    given = {key: getattr(args, key, default) for key, default in DEFAULTS.items() if key != "mas"}
    return [f"{key}={value}" for key, value in given.items() if value != DEFAULTS[key]]


def why_not(trainer: Any, model: nn.Module) -> str | None:
    """Return the reason why Ultralytics runs the batches of a trainer; None if the engine runs them.

    Args:
        trainer: Ultralytics trainer.
        model: Its model without wrappers.
    """
    if not trainer.args.mas:
        return "mas=False"
    if trainer.device.type not in ("cuda", "cpu"):
        return f"{trainer.device.type} devices do not tell their memory"
    return "quantize is set" if getattr(trainer.args, "quantize", None) else why_not_split(model, trainer.args)
