"""What happens around one call of `YOLO.train`: checks before it, the recipe, and no litter after a false start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov12.training.preflight import check_training_arguments
from yolov12.training.recipes import recipe_for

__all__ = ["train"]


def train(stock_train: Callable[..., Any], model: Any, trainer: Any, arguments: dict[str, Any]) -> Any:
    """Run Ultralytics' `Model.train` with this package's checks and recipe.

    Args:
        stock_train: Ultralytics' own method.
        model: The `YOLO` object.
        trainer: A trainer class, or None for the task's own.
        arguments: Keyword arguments of the user.

    Returns:
        What Ultralytics returns: the metrics.

    Raises:
        ConfigError, DataError: See `check_training_arguments`.
    """
    model._check_is_pytorch_model()
    if not arguments.get("resume"):
        given = {**_from_file(arguments.get("cfg")), **arguments}
        check_training_arguments(given, model.task)
        arguments = {**_recipe(model, given), **arguments}
    model.trainer = None
    try:
        return stock_train(model, trainer, **arguments)
    except Exception:
        _remove_false_start(model.trainer)
        raise


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
    recipe = recipe_for(getattr(model.model, "yaml", {}), given)
    if recipe:
        values = " ".join(f"{key}={value}" for key, value in recipe.items())
        scale = model.model.yaml["scale"].upper()
        LOGGER.info(f"recipe: {values} (official YOLOv12-{scale}; recipe=False turns it off)")
    return recipe


def _remove_false_start(trainer: Any) -> None:
    # A run that failed before its first epoch holds nothing but its own arguments, and its name would be taken.
    if trainer is None or hasattr(trainer, "epoch") or trainer.resume or trainer.args.exist_ok:
        return
    shutil.rmtree(trainer.save_dir, ignore_errors=True)
