"""Work around one training: checks and the recipe before it, and clean-up after a false start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from yolov12.errors import ConfigError, NothingToResumeError, UntrustedWeightsError
from yolov12.mas.config import DEFAULTS, Config
from yolov12.models import weights
from yolov12.training.classes import head
from yolov12.training.run import run_folder
from yolov12.training.run.options import OPTIONS, Interval, check_data_arguments
from yolov12.training.run.preflight import check_training_arguments
from yolov12.training.run.recipes import recipe_for
from yolov12.training.run.resume import begun, is_complete, latest_interrupted
from yolov12.training.run.saved_state import FILE

__all__ = ["check_resume", "no_false_start", "remove_false_start", "train"]

_OF_THE_ENGINE = {"mas", "bn_group"}  # arguments that a run keeps if the engine ran its batches

# Files that are written before the first epoch. A journal without a picture has no rows.
_BEFORE_THE_FIRST_EPOCH = {".lock", "args.yaml", "classes.csv", "labels.jpg", "memory.csv", "memory.json"}


def train(stock_train: Callable[..., Any], model: Any, /, trainer: Any = None, **arguments: Any) -> Any:
    """Run Ultralytics' `Model.train` with this package's checks and recipe.

    Args:
        stock_train: Ultralytics' own method.
        model: The `YOLO` object.
        trainer: A trainer class, or None for the task's own.
        arguments: Keyword arguments of the user.

    Returns:
        Metrics, as `stock_train` returns them.

    Raises:
        ConfigError: An argument is not valid, see `check_training_arguments`.
        DataError: The data set cannot be used, see `check_training_arguments`.
    """
    model._check_is_pytorch_model()
    engine = {**_defaults(), **(_from_file(arguments.get("cfg")) or model.overrides), **arguments}
    Config.check(engine)
    if engine["mas"]:
        # Without it, micro-batches of many shapes fragment the memory. PyTorch reads it when it initialises CUDA.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    Interval.parse(engine["save_every"])
    check_data_arguments(engine)
    arguments = _resolve_resume(model, arguments)
    from_file = _from_file(arguments.get("cfg"))
    if _resumes(model, arguments):  # all other arguments are those of the run
        check_training_arguments({**from_file, **arguments}, model.task)
    else:
        given = {**(from_file or model.overrides), **arguments}
        is_theirs = isinstance(given.get("pretrained"), (str, Path))  # the weights are another file's
        check_training_arguments(given, model.task, None if is_theirs else head.known_names(model.model))
        arguments = {**_recipe(model, given), **arguments}
    return stock_train(model, trainer, **arguments)


def check_resume(stock_check_resume: Callable[..., None], trainer: Any, overrides: dict[str, Any]) -> None:
    """Run Ultralytics' check of a resume, which restores all arguments, but let memory arguments change.

    The run continues in the folder of the checkpoint, which may have been moved or copied since. Whether it resumes or
    not, its folder is locked.

    Args:
        stock_check_resume: Ultralytics' own method.
        trainer: Ultralytics trainer, which gets the arguments of the checkpoint.
        overrides: Arguments that the user has given.

    Raises:
        UntrustedWeightsError: The checkpoint asks for code, such as a class of the user's.
        FileNotFoundError: There is no checkpoint to resume from.
        NothingToResumeError: The training is complete.
        ConfigError: An argument cannot work with what the run keeps.
        FolderInUseError: Another training runs in the folder.
    """
    _restore_arguments(stock_check_resume, trainer, overrides)
    run_folder.reserve(trainer)


def _restore_arguments(stock_check_resume: Callable[..., None], trainer: Any, overrides: dict[str, Any]) -> None:
    ours = {key: value for key, value in overrides.items() if key in DEFAULTS or key in OPTIONS}
    try:
        stock_check_resume(trainer, {key: value for key, value in overrides.items() if key not in ours})
    except FileNotFoundError as error:
        if isinstance(error.__cause__, UntrustedWeightsError):
            raise error.__cause__ from None  # it names the code, and says how to trust it
        raise
    if not trainer.resume:
        return
    if is_complete(Path(trainer.args.resume)):
        raise NothingToResumeError(
            f"{trainer.args.resume}: there is nothing to resume: this training is complete, or these weights are of no "
            f"training. To train on, start a new run: model={trainer.args.resume} with data=, epochs= and no resume="
        )
    weights_folder = Path(trainer.args.resume).absolute().parent
    if not overrides.get("save_dir"):
        if weights_folder.name == "weights":
            trainer.args.save_dir = str(weights_folder.parent)
        else:
            _stay_among_the_runs(trainer.args)
    kept = {"recipe", "replay", "replay_fraction", "rename"}
    if not ours.keys().isdisjoint(_OF_THE_ENGINE) and _had_the_engine(trainer.args):
        kept |= _OF_THE_ENGINE
    for key, value in ours.items():
        moved = key == "replay" and value is not None and trainer.args.replay is not None  # as data= may be elsewhere
        if key not in kept or moved:
            setattr(trainer.args, key, value)
        elif value != getattr(trainer.args, key):
            from ultralytics.utils import LOGGER

            LOGGER.warning(f"{key}={value}: a run goes on with the {key}={getattr(trainer.args, key)} it began with")
    if trainer.args.mas:
        _check_group(trainer.args)


def _check_group(args: Any) -> None:
    group = Config.parse({"bn_group": args.bn_group}).bn_group
    images = Config.parse({"micro_batch": args.micro_batch}).micro_batch
    if group and images and images < group:
        raise ConfigError(
            f"micro_batch={images}: the run began with bn_group={group}, goes on with it, and needs these images at "
            f"once: give at least micro_batch={group}, leave it out, or start a new run"
        )


def _had_the_engine(args: Any) -> bool:
    """Return whether the engine ran the batches of a run: `mas` is True, and its checkpoint says so.

    Ultralytics restores arguments that a checkpoint lacks, such as its own without this package, as their defaults.

    Args:
        args: Arguments of the run, restored from its checkpoint.
    """
    return bool(args.mas) and "mas" in (weights.read(args.resume).get("train_args") or {})


def _stay_among_the_runs(args: Any) -> None:
    """Let a run write to a new folder, if the file that it resumes from names one outside of Ultralytics' runs folder.

    Args:
        args: Arguments of the run, from a checkpoint that is not in the folder of a run.
    """
    from ultralytics.utils import LOGGER, SETTINGS
    from ultralytics.utils.files import increment_path

    runs = Path(SETTINGS["runs_dir"]).resolve()
    saved = getattr(args, "save_dir", None)
    named = Path(saved or runs / str(args.task) / str(args.project or "") / str(args.name or ""))
    if not named.resolve().is_relative_to(runs):
        args.save_dir = str(increment_path(runs / "resumed"))
        LOGGER.warning(f"The checkpoint names the folder {named}, which is outside of {runs}: using {args.save_dir}")


@contextmanager
def no_false_start(trainer: Any) -> Iterator[None]:
    """Remove the trainer's run folder if the block fails before a batch has run: see `remove_false_start`."""
    try:
        yield
    except BaseException:
        # Where a trainer starts other processes, they do the same.
        if not getattr(trainer, "ddp", False) and not isinstance(getattr(trainer, "loss", None), Tensor):
            remove_false_start(getattr(trainer, "save_dir", None))
        raise


def remove_false_start(folder: Path | None) -> None:
    """Remove a run folder with nothing but the files that precede the first epoch, so that its name can be used again.

    Args:
        folder: Folder of the run; None if there is none yet.
    """
    if folder is None or not folder.is_dir():
        return
    if all(file.name in _BEFORE_THE_FIRST_EPOCH for file in folder.rglob("*") if not file.is_dir()):
        shutil.rmtree(folder, ignore_errors=True)


def _resumes(model: Any, arguments: dict[str, Any]) -> bool:
    resume = arguments.get("resume", model.overrides.get("resume"))
    if resume is True:  # Ultralytics starts anew if the model is not an interrupted training
        checkpoint = model.ckpt or {}
        return checkpoint.get("epoch", -1) >= 0 and checkpoint.get("optimizer") is not None
    return bool(resume)


def _resolve_resume(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the checkpoint to resume from.

    They change for `resume=auto`, and if only the state file shows that the run is not complete.
    """
    from ultralytics.utils import LOGGER

    resume = arguments.get("resume", model.overrides.get("resume"))
    path = Path(str(model.ckpt_path))
    if resume is True and model.ckpt and path.name == "last.pt" and path.with_name(FILE).exists():
        return {**arguments, "resume": str(path)}
    if str(resume).lower() != "auto":
        return arguments
    given = {**(_from_file(arguments.get("cfg")) or model.overrides), **arguments}
    last = latest_interrupted(given, model.task)
    if last is None:
        # A run without the engine takes no lock, so the next one could not tell that it is alive.
        may_take = given.get("mas", True) and not (given.get("save_dir") or given.get("exist_ok"))
        folder = begun(given, model.task) if may_take else None
        where = {} if folder is None else {"save_dir": str(folder)}
        line = "resume=auto: no run of this project and name was interrupted: starting anew"
        LOGGER.info(" in ".join([line, *where.values()]))
        return {**arguments, "resume": False, **where}
    LOGGER.info(f"resume=auto: going on with {last}")
    model._load(str(last))
    # The run itself determines its folder and name.
    kept = {key: value for key, value in arguments.items() if key not in ("project", "name", "exist_ok", "save_dir")}
    return {**kept, "resume": str(last)}


def _defaults() -> dict[str, Any]:
    from ultralytics.utils import DEFAULT_CFG_DICT

    return {key: DEFAULT_CFG_DICT[key] for key in (*DEFAULTS, *OPTIONS)}


def _from_file(cfg: str | Path | None) -> dict[str, Any]:
    if not cfg:
        return {}
    from ultralytics.utils import YAML
    from ultralytics.utils.checks import check_yaml

    settings: dict[str, Any] = YAML.load(check_yaml(cfg))
    return settings


def _recipe(model: Any, given: dict[str, Any]) -> dict[str, float]:
    from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER

    if not given.get("recipe", DEFAULT_CFG_DICT["recipe"]):
        return {}
    scale, recipe = recipe_for(getattr(model.model, "yaml", {}), given)
    if recipe:
        values = " ".join(f"{key}={value}" for key, value in recipe.items())
        LOGGER.info(f"recipe: {values} (official YOLOv12-{scale.upper()}; recipe=False turns it off)")
    return recipe
