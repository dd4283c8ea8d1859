"""Loading weight files without running what is in them.

A `.pt` file is a pickle, and a pickle can call any function there is. Files are shared, so none is trusted: what is
read is data, tensors and the layers Ultralytics checkpoints are made of, with the same code on every torch from 2.3.
`YOLOV12_TRUST_WEIGHTS=1` hands a file to the stock loader instead, which runs whatever it says.
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import nn

from yolov12 import files
from yolov12.errors import UntrustedWeightsError, WeightsError
from yolov12.models.layouts import mark_layout
from yolov12.models.names import OFFICIAL, resolve
from yolov12.models.unpickle import Restricted
from yolov12.models.yaml_check import check_yaml

__all__ = ["OFFICIAL", "check_yaml", "load", "read", "resolve", "strip_optimizer", "torch_safe_load"]

TRUST = "YOLOV12_TRUST_WEIGHTS"


def load(weight: str | Path, trusted_loader: Callable[..., Any] | None = None) -> tuple[dict[str, Any], str]:
    """Load a checkpoint: `ultralytics.nn.tasks.torch_safe_load` without its dangers.

    Args:
        weight: A path, or a name that `resolve` knows.
        trusted_loader: The stock loader, used when YOLOV12_TRUST_WEIGHTS=1; looked up when it is not given.

    Returns:
        The checkpoint, whose `ema` or `model` is a module, and the path of the file.

    Raises:
        UntrustedWeightsError: The file asks for something that would run code; the message lists all of it.
        WeightsError: The file is missing, incomplete, or not a checkpoint.
    """
    file = resolve(weight)
    if _trusted():
        return (trusted_loader or _stock_loader())(file)  # type: ignore[no-any-return]
    found = read(file)
    checkpoint = {"model": found} if isinstance(found, nn.Module) else found
    if not isinstance(checkpoint, dict) or not _has_model(checkpoint):
        _raise_without_model(file, checkpoint)
    _check_settings(file, checkpoint)
    return checkpoint, file


def read(file: str | Path) -> Any:
    """Read a file as `torch.load(file, map_location="cpu")` does, without running what is in it.

    Raises:
        UntrustedWeightsError: The file asks for something that would run code; the message lists all of it.
        WeightsError: The file is missing, incomplete, or was not written by `torch.save`.
    """
    path = Path(file)
    if _trusted():
        return torch.load(path, map_location="cpu", weights_only=False)
    pickle_module = Restricted()
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        if zipped := start == b"PK\x03\x04":
            pickle_module = Restricted(_records(path))
        elif start[:1] != pickle.PROTO:  # what torch.save wrote before it wrote archives starts with a pickle
            raise pickle.UnpicklingError("no torch.save file")
        # From memory, torch does not try the tar format that came before 2017, which writes files while it reads.
        source = path if zipped else io.BytesIO(path.read_bytes())
        found = torch.load(source, map_location="cpu", pickle_module=pickle_module, weights_only=False)
    except WeightsError:
        raise
    except Exception as e:
        if not pickle_module.refused:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            raise WeightsError(
                f"{file} cannot be read as a checkpoint: it is empty, incomplete, or something else ({reason:.200}). "
                "Delete it and download or copy it again."
            ) from e
    if pickle_module.refused:
        raise UntrustedWeightsError(
            f"{file} asks for {', '.join(pickle_module.refused)}, which no checkpoint of Ultralytics needs. None of it "
            f"was run. If you trust whoever made the file, set {TRUST}=1 to load it all the same."
        )
    return found


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
    """
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

    Raises:
        WeightsError: See `read`.
    """
    read(f)
    if args or "s" in kwargs:
        return stock(f, *args, **kwargs)
    with files.replacing(f) as unfinished:
        return stock(f, str(unfinished), **kwargs)


def _trusted() -> bool:
    return os.environ.get(TRUST) == "1"


def _stock_loader() -> Callable[..., Any]:
    from ultralytics.nn import tasks

    return getattr(tasks.torch_safe_load, "__wrapped__", tasks.torch_safe_load)  # type: ignore[no-any-return]


def _records(path: Path) -> dict[str, int]:
    # Asked of torch's own reader: two readers can be made to see two different lists of contents in one file.
    reader: Any = torch._C.PyTorchFileReader(str(path))
    if "constants.pkl" in reader.get_all_records():
        raise WeightsError(
            f"{path} is a TorchScript archive, which is a program. Load the .pt file it was exported from, or run it "
            "as an exported model with another suffix than .pt."
        )
    with ZipFile(path) as archive:
        entries = archive.infolist()
    sizes = {entry.filename.partition("/")[2].lower(): entry.file_size for entry in entries}
    if len(sizes) != len(entries):  # torch might read another one than the one whose size we know
        raise BadZipFile("two records have the same name")
    return sizes


def _has_model(checkpoint: Mapping[str, Any]) -> bool:
    parts = [checkpoint.get("ema"), checkpoint.get("model")]
    return any(parts) and all(part is None or isinstance(part, nn.Module) for part in parts)


def _raise_without_model(file: str, found: Any) -> None:
    state = found.get("model", found) if isinstance(found, dict) else None
    if isinstance(state, dict) and state and all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(
            f"{file} holds {len(state)} tensors and no model (a state dict). Build their model and fill it: "
            f"model = YOLO('yolov12s.yaml'); model.model.load_state_dict(torch.load({file!r}, weights_only=True)); "
            "model.save() then makes a checkpoint of it."
        )
    raise WeightsError(f"{file} holds a {type(found).__name__} without a model. Give a checkpoint that YOLO saved.")


def _check_settings(file: str, checkpoint: dict[str, Any]) -> None:
    """Deal with what Ultralytics would act on later."""
    if checkpoint.get("modelopt"):
        raise UntrustedWeightsError(
            f"{file} holds a state for NVIDIA ModelOpt, which installs and runs that package to restore it. If you "
            f"trust whoever made the file, set {TRUST}=1."
        )
    settings = checkpoint.get("train_args") or {}
    if not isinstance(settings, dict):
        raise WeightsError(f"{file} has train_args that are a {type(settings).__name__}. Give one that YOLO saved.")
    if _is_elsewhere(settings.get("data")):
        from ultralytics.utils import LOGGER

        LOGGER.warning(f"{file} was trained on {settings.pop('data')!r:.120}. That is not fetched unasked: pass data=.")


def _is_elsewhere(data: Any) -> bool:
    """Whether `val()` and `resume` would fetch this data set, and run the `download:` code or the cache in it."""
    text = str(data)
    if re.search(r"[a-z]{2,}:[/\\]|^[/\\]{2}", text, re.IGNORECASE):
        return True
    # A classification data set that is not here is fetched from the Ultralytics assets' address plus this text.
    return re.search(r"%|\.\.", text) is not None and not Path(text).exists()
