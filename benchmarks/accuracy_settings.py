"""Variants and sizes of the trainings of benchmarks/accuracy.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

VARIANTS = ("stock", "256", "neighbour", "stock256", "nbs256", "same", "256lr", "device")
STOCK = ("stock", "stock256", "nbs256")
LARGE = ("256", "neighbour", "stock256", "256lr", "device")
NICENESS = 5
"""How far trainings with large batches stand back for the others on the host."""
CONTEXT_GIB = 1.0
"""Memory of a process on a GPU besides that of PyTorch's allocator."""
NEIGHBOUR = (0.0, 0.4)
"""Least and most that the neighbour takes, as fractions of the limits of all trainings together."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the trainings."""

    device: str = "0"
    models: tuple[str, ...] = ("s", "n")
    data: tuple[str, ...] = ("hard", "demo")
    imgsz: int = 320
    limit_gib: float | None = 4.0
    """Limit of each training; None for none."""
    large: int = 256
    nbs: int = 64
    """Images for which Ultralytics updates the weights, if a batch is smaller."""
    candidates: tuple[int, ...] = (16, 24, 32, 40, 48)
    """Batches to try with stock."""
    images: int = 2048
    """Images of `demo` to train on; `hard` has half as many."""
    val: int = 256
    passes: int = 28
    """Number of times that a training sees each image of `demo`; twice as often those of `hard`."""
    epochs: int = 14
    """Number of validations. An epoch has each image several times."""
    base_epochs: int = 8
    """Epochs of the base model; 0 to start from random weights."""
    lr0: float = 0.000714
    """What `optimizer=auto` chooses for ten classes."""
    close_mosaic: int = 4
    cache: str | bool = "ram"
    workers: int = 2

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that all trainings have."""
        names = ("device", "imgsz", "nbs", "epochs", "lr0", "close_mosaic", "cache", "workers")
        own = {name: getattr(self, name) for name in names}
        return {
            **own,
            "optimizer": "AdamW",
            "momentum": 0.9,
            "warmup_bias_lr": 0.0,  # what optimizer=auto sets
            "plots": False,
            "exist_ok": True,
        }


GPU = Settings()
CPU = Settings(
    device="cpu",
    models=("tiny",),
    data=("shapes",),
    imgsz=96,
    limit_gib=None,
    large=64,
    nbs=16,
    candidates=(16,),
    images=160,
    val=80,
    passes=80,
    epochs=20,
    base_epochs=0,
    lr0=0.005,
    close_mosaic=3,
    cache="ram",
    workers=0,
)
SMALL = replace(CPU, imgsz=64, images=16, val=8, passes=2, epochs=1, close_mosaic=0, nbs=4, large=8, candidates=(2,))
