"""All other files that Ultralytics reads with `torch.load`, such as SAM, NAS and text embeddings, and text encoders."""

from __future__ import annotations

import inspect
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from yolov12 import own_files
from yolov12.errors import UntrustedWeightsError
from yolov12.models import weights
from yolov12.untrusted import TRUST_WEIGHTS, is_set

__all__ = ["generate_ddp_file", "get_text_pe", "torch_load"]

# The package `clip` compares the SHA-256 of these with its own list before it loads them.
_CHECKED_BY_CLIP = re.compile(r"clip:(RN(50|101|50x4|50x16|50x64)|ViT-(B/32|B/16|L/14|L/14@336px))")


def torch_load(stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Read a file in place of Ultralytics' `torch_load`, without running its code.

    Args:
        stock: Ultralytics' own function, used with YOLOV12_TRUST_WEIGHTS=1 and for a `pickle_module` of the caller.
        args: Positional arguments of `torch.load`.
        kwargs: Keyword arguments of `torch.load`.

    Returns:
        The object in the file, with tensors on the CPU unless `map_location` says where.

    Raises:
        WeightsError: See `yolov12.models.weights.read`.
    """
    given = inspect.signature(torch.load).bind(*args, **kwargs).arguments
    if is_set(TRUST_WEIGHTS) or given.get("pickle_module"):
        return stock(*args, **kwargs)
    found, location = _read(given["f"]), given.get("map_location")
    if location is None or str(location) == "cpu":
        return found
    with io.BytesIO() as copy:  # what was read is safe, and PyTorch knows every kind of location
        torch.save(found, copy)
        copy.seek(0)
        return torch.load(copy, location, weights_only=False)


def _read(file: Any) -> Any:
    if isinstance(file, (str, os.PathLike)):
        return weights.read(file)
    name = getattr(file, "name", None)
    if isinstance(name, str) and Path(name).is_file() and file.tell() == 0:
        return weights.read(name)
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:  # a buffer of the caller
        copy.write(file.read())
        copy.flush()
        return weights.read(copy.name)


def generate_ddp_file(stock: Callable[..., str], /, trainer: Any) -> str:
    """Run Ultralytics' `generate_ddp_file`, and let the processes of this training read the file that it wrote.

    Args:
        stock: Ultralytics' own function.
        trainer: Ultralytics trainer.

    Returns:
        Path of the script that the processes run. The state of the trainer is beside it.
    """
    script = stock(trainer)
    with Path(script).with_suffix(".pt").open("rb") as file:
        own_files.remember(file)
    return script


def get_text_pe(stock: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `YOLOEModel.get_text_pe`, if its text encoder is one that is checked.

    Args:
        stock: Ultralytics' own method.
        model: A YOLOE model, whose weight file names the encoder.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Returns:
        Embeddings of the texts.

    Raises:
        UntrustedWeightsError: The encoder is a TorchScript program, or a file that the weight file names.
    """
    encoder = str(getattr(model, "text_model", "mobileclip:blt"))
    if not is_set(TRUST_WEIGHTS) and not _CHECKED_BY_CLIP.fullmatch(encoder):
        raise UntrustedWeightsError(
            f"The text encoder {encoder!r:.120} of this model is a program (TorchScript) or a file that its author "
            "names. Loading it can run any code; it was not loaded. If you trust the author of the model and the "
            f"encoder's file, set {TRUST_WEIGHTS}=1."
        )
    return stock(model, *args, **kwargs)
