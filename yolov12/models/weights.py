"""Loads weight files without running code that they contain.

A `.pt` file is a pickle, and a pickle can call any function. Users share these files, so no file is trusted. The loader
reads plain data, tensors and the layers of Ultralytics checkpoints, from torch 2.3 on. `YOLOV12_TRUST_WEIGHTS=1` uses
the stock loader instead, which runs all code in the file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolov12 import files, own_files
from yolov12.errors import MissingWeightsError, UnreadableWeightsError, UntrustedWeightsError, WeightsError
from yolov12.models import torch_file
from yolov12.models.layouts import mark_layout
from yolov12.models.limits import LimitError
from yolov12.models.weight_names import OFFICIAL, resolve
from yolov12.models.yaml_check import check_yaml
from yolov12.untrusted import TRUST_WEIGHTS as TRUST
from yolov12.untrusted import is_set

__all__ = ["OFFICIAL", "check_yaml", "load", "read", "resolve", "save", "strip_optimizer", "torch_safe_load"]


def load(weight: str | Path, trusted_loader: Callable[..., Any] | None = None) -> tuple[dict[str, Any], str]:
    """Load a checkpoint, like `ultralytics.nn.tasks.torch_safe_load` but without running its code.

    Args:
        weight: A path, or a name that `resolve` knows.
        trusted_loader: The stock loader, used if YOLOV12_TRUST_WEIGHTS=1. Default: the one of Ultralytics.

    Returns:
        The checkpoint, with a module under `ema` or `model`, and the path of the file.

    Raises:
        UntrustedWeightsError: The file asks for code outside the allow-list. The message lists all of it.
        UnreadableWeightsError: The file is incomplete, or not a checkpoint.
        MissingWeightsError: The file does not exist.
    """
    file = resolve(weight)
    if is_set(TRUST):
        return (trusted_loader or _stock_loader())(file)  # type: ignore[no-any-return]
    found, is_own = _read(Path(file))
    checkpoint = {"model": found} if isinstance(found, nn.Module) else found
    if not isinstance(checkpoint, dict) or not _has_model(checkpoint):
        _raise_without_model(file, checkpoint)
    _check_settings(file, checkpoint, is_own)
    return checkpoint, file


def read(file: str | os.PathLike[str]) -> Any:
    """Read a file like `torch.load(file, map_location="cpu")`, without running its code.

    A file that this process wrote is read by `torch.load` itself.

    Args:
        file: A file that `torch.save` wrote.

    Returns:
        The object in the file, with tensors on the CPU.

    Raises:
        UntrustedWeightsError: The file asks for code outside the allow-list. The message lists all of it.
        UnreadableWeightsError: The file is incomplete, or was not written by `torch.save`.
        MissingWeightsError: The file does not exist.
    """
    return _read(Path(file))[0]


def _read(path: Path) -> tuple[Any, bool]:
    """Return the object in a file, and whether this process wrote the file."""
    if is_set(TRUST):
        return torch.load(path, map_location="cpu", weights_only=False), False
    refused: list[str] = []
    try:
        with path.open("rb") as file:
            if own_files.is_own(file):
                return torch.load(file, map_location="cpu", weights_only=False), True
            found = torch_file.load(file, refused)
    except WeightsError:
        raise
    except FileNotFoundError as e:
        raise MissingWeightsError(f"{path} does not exist (folder: {Path.cwd()}). Check the path.") from e
    except LimitError as e:
        if not refused:
            raise UnreadableWeightsError(
                f"{path} has {e}, which no checkpoint of Ultralytics has. Reading stopped. If you trust the author of "
                f"the file, set {TRUST}=1 to load it without limits."
            ) from e
    except Exception as e:
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # a damaged file can lead to a wrong seek
            raise UnreadableWeightsError(
                f"{path} cannot be read: {e.strerror}. The file may be whole: check its permissions and its disk."
            ) from e
        if not refused:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            raise UnreadableWeightsError(
                f"{path} cannot be read as a checkpoint: it is empty, incomplete, or another format ({reason:.200}). "
                "Delete it and download or copy it again."
            ) from e
    if refused:
        raise UntrustedWeightsError(
            f"{path} asks for {', '.join(refused)}, which no checkpoint of Ultralytics needs. None of it "
            f"was run. If you trust the author of the file, set {TRUST}=1 to load it without this check."
        )
    return found, False


def torch_safe_load(stock: Callable[..., Any], /, weight: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], str]:
    """Load a checkpoint in place of Ultralytics' `torch_safe_load`, with the layout of its model in the yaml.

    Args:
        stock: Ultralytics' own function, used with YOLOV12_TRUST_WEIGHTS=1.
        weight: A path, or a name that `resolve` knows.
        args: Ignored, as `safe_only` is: loading is always safe.
        kwargs: Ignored too.

    Returns:
        The checkpoint, and the path of the file.

    Raises:
        WeightsError: See `load`.
        AssertionError: The name of the file does not end in `.pt`.
    """
    from ultralytics.utils.checks import check_suffix

    check_suffix(file=weight, suffix=".pt")
    checkpoint, file = load(weight, trusted_loader=stock)
    for key in ("model", "ema"):
        if checkpoint.get(key) is not None:
            mark_layout(checkpoint[key])
    return checkpoint, file


def strip_optimizer(stock: Callable[..., Any], /, f: Any = "best.pt", *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `strip_optimizer` on a checked file, which is replaced in one go.

    Args:
        stock: Ultralytics' own function. It loads without any restriction.
        f: A checkpoint, maybe of a run folder that comes from elsewhere.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Returns:
        What `stock` returns: the checkpoint; empty if the file is not a checkpoint, with a warning in the log.

    Raises:
        UntrustedWeightsError: See `load`.
    """
    from ultralytics.utils import LOGGER

    try:
        found, is_own = _read(Path(f))
        if not isinstance(found, dict) or "model" not in found:
            raise UnreadableWeightsError("it holds no model")
        _check_settings(f, found, is_own)  # afterwards it is a file of this process
    except UntrustedWeightsError:
        raise
    except WeightsError as error:
        LOGGER.warning(f"Skipping {f}, not a valid Ultralytics model: {error}")
        return {}
    if args or "s" in kwargs:
        with own_files.written((args[0] if args else kwargs["s"]) or f):
            return stock(f, *args, **kwargs)
    with files.replacing(f) as unfinished, _left_out_of_log(f" saved as {unfinished},"):
        return stock(f, str(unfinished), **kwargs)


def save(stock: Callable[..., None], model: Any, /, filename: Any = "saved_model.pt") -> None:
    """Run Ultralytics' `Model.save`, and trust the file in this process.

    Args:
        stock: Ultralytics' own method.
        model: The `YOLO` object.
        filename: Path of the file, or a file object, which `torch.save` accepts as well.
    """
    paths = [Path(filename)] if isinstance(filename, (str, os.PathLike)) else []
    with own_files.written(*paths):
        stock(model, filename)


@contextmanager
def _left_out_of_log(words: str) -> Iterator[None]:
    """Return a context in which Ultralytics' log lines leave out some words, such as the name of a temporary file."""
    from ultralytics.utils import LOGGER

    def leave_out(record: LogRecord) -> bool:
        record.msg = str(record.msg).replace(words, "")
        return True

    LOGGER.addFilter(leave_out)
    try:
        yield
    finally:
        LOGGER.removeFilter(leave_out)


def _stock_loader() -> Callable[..., Any]:
    from ultralytics.nn import tasks

    return getattr(tasks.torch_safe_load, "__wrapped__", tasks.torch_safe_load)  # type: ignore[no-any-return]


def _has_model(checkpoint: Mapping[str, Any]) -> bool:
    parts = [checkpoint.get("ema"), checkpoint.get("model")]
    return any(part is not None for part in parts) and all(
        part is None or isinstance(part, nn.Module) for part in parts
    )


def _raise_without_model(file: str, found: Any) -> None:
    state = found.get("model", found) if isinstance(found, dict) else None
    if isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UnreadableWeightsError(
            f"{file} holds {len(state)} tensors and no model (a state dict). This is no supported Ultralytics "
            "checkpoint format. Build the model and load them: model = YOLO('yolov12s.yaml'); "
            f"model.model.load_state_dict(torch.load({file!r}, weights_only=True)); "
            "model.save() then writes a checkpoint."
        )
    raise UnreadableWeightsError(
        f"{file} holds a {type(found).__name__} without a model. Give a checkpoint that YOLO saved."
    )


def _check_settings(file: str, checkpoint: dict[str, Any], is_own: bool) -> None:
    """Refuse or remove settings that would make Ultralytics run or download something later."""
    if checkpoint.get("modelopt") is not None and not is_own:
        raise UntrustedWeightsError(
            f"{file} holds a state for NVIDIA ModelOpt. To restore it, Ultralytics would install and run that package. "
            f"If you trust the author of the file, set {TRUST}=1."
        )
    settings = checkpoint.get("train_args")
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise UnreadableWeightsError(
            f"{file} has train_args of type {type(settings).__name__}. Give a checkpoint that YOLO saved."
        )
    for name, way_out in (("data", "Give data="), ("replay", "A resumed run goes on without it")):
        if _is_remote(settings.get(name)):
            from ultralytics.utils import LOGGER

            LOGGER.warning(
                f"{file} was trained on {settings.pop(name)!r:.120}. This data set is not downloaded automatically. "
                f"{way_out}."
            )


def _is_remote(data: Any) -> bool:
    """Return True if `val()` and `resume` would download this data set and run its `download:` code or its cache."""
    text = str(data)
    if re.search(r"[a-z]{2,}:[/\\]|^[/\\]{2}", text, re.IGNORECASE):
        return True
    # Ultralytics appends the name of a missing classification data set to the address of its assets.
    return re.search(r"%|\.\.", text) is not None and not os.path.exists(text)  # noqa: PTH110 - raises no error
