"""Search for the state of a training that a resume goes on from, see `run_state`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolov12.models import weights
from yolov12.training.data.loader import data_of
from yolov12.training.run.result_rows import has_row

__all__ = ["FILE", "VERSION", "find"]

FILE = "state.pt"
"""Name of the state file, which is beside `last.pt` until the run is complete."""

VERSION = 2
"""Version of the file that this package writes."""

_READABLE = (1, 2)  # version 1 calls the resolution `data_layer`, and its steps `rungs`

_KEYS = frozenset(
    (
        "accumulate", "best_fitness", "criterion", "cuda", "ema", "epoch", "epoch_s", "epochs", "fitness", "loader",
        "loss", "model", "of_epoch", "optimizer", "random", "rows", "scaler", "stopper", "tloss", "updates",
    )
)  # fmt: skip
"""Keys that every version has."""

_SIZES = frozenset(("resolution", "data_layer"))  # the same in different versions


def find(trainer: Any, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the state to resume from.

    Args:
        trainer: Ultralytics trainer that resumes.
        checkpoint: Checkpoint that it resumes from.

    Returns:
        The state, with the metrics of its epoch under `validated` if the checkpoint is of that epoch. None if it is not
        the run's last one, or if the state is missing, older than the checkpoint, unreadable, or of other data or
        another model. All but the first three log a warning.
    """
    from ultralytics.utils import LOGGER

    path = Path(trainer.wdir, FILE)
    if not path.exists() or Path(str(trainer.args.resume)).resolve() != Path(trainer.last).resolve():
        return None
    try:
        state: dict[str, Any] = weights.read(path)
        was, now = state["loader"]["data"], data_of(trainer.train_loader)
        other = [f"{now[name]} {name}, not {was[name]}" for name in now if was[name] != now[name]]
        whole = state["version"] in _READABLE and 0 < state["loader"]["position"] <= was["batches"]
        whole = whole and state.keys() >= _KEYS and not _SIZES.isdisjoint(state)
        if whole and not _is_of_model(state, trainer):
            other.append("it is of another model")
    except Exception as error:  # a file from elsewhere may raise any error
        other, whole = [f"it cannot be read ({type(error).__name__})"], True
    if not whole:
        other.append("it is of another version, or not a state of this package")
    if other:
        LOGGER.warning(
            f"resume: {path} is not used: {', '.join(other)}. Going on from the end of an epoch, {trainer.last}"
        )
        return None
    epoch = checkpoint.get("epoch", -1)
    # The checkpoint of an epoch is written after its validation. The optimizer is removed after the last epoch.
    is_complete = epoch == state["epoch"] or checkpoint.get("optimizer") is None
    # A run that went on from an earlier checkpoint has no row, while `last.pt` is still what came before. A trainer of
    # the user's own may write no rows at all.
    rows, is_whole = Path(trainer.csv), state["loader"]["position"] == was["batches"]
    is_complete = is_complete and (has_row(rows, state["epoch"] + 1) if rows.exists() else is_whole)
    state["validated"] = checkpoint.get("train_metrics") if is_complete else None
    return state if state["epoch"] >= epoch else None


def _is_of_model(state: Mapping[str, Any], trainer: Any) -> bool:
    """Return whether a state has the parameters of a trainer's model. Its buffers may change their shapes."""
    from ultralytics.utils.torch_utils import unwrap_model

    shapes = {name: parameter.shape for name, parameter in unwrap_model(trainer.model).named_parameters()}
    return all(
        name in state[key] and state[key][name].shape == shape
        for key in ("model", "ema")
        for name, shape in shapes.items()
    )
