"""A training on label-dense data, measured by its callbacks: what the processes of benchmarks/dense_runs.py do."""

from __future__ import annotations

import functools
import os
import random
import statistics
import sys
import time
import traceback
from types import SimpleNamespace
from typing import Any

from benchmarks.common.processes import limit_memory

MODEL = "yolo12s.yaml"
"""The v1.0 layout, which stock can run, too."""
IMAGES, EPOCHS = 1536, 16
"""Images of an epoch, and epochs of a whole training."""
BATCH = 256
"""Batch of ours, and the number of images of an optimizer step of every training (`nbs`)."""
TRAIN: dict[str, Any] = {
    "imgsz": 640,
    "device": 0,
    "cache": "ram",
    "plots": False,
    "val": False,
    "save": False,
    "workers": 14,
    "optimizer": "SGD",
    "lr0": 1e-3,
    "mosaic": 1.0,
    "copy_paste": 0.1,
    "close_mosaic": 0,
}
EQUAL: dict[str, Any] = {"nbs": BATCH, "warmup_epochs": 0}
"""A warm-up of stock would begin with an optimizer step for each batch, whatever `nbs` is."""
OURS: dict[str, Any] = {"recipe": False}
SMALL: dict[str, Any] = {
    "model": "yolo12n.yaml",
    "imgsz": 64,
    "device": "cpu",
    "cache": False,
    "workers": 0,
    "nbs": 8,
}
"""Arguments of a training on a CPU."""
HALVED, ASSIGNED_SINGLY = "Reducing to batch", "TaskAlignedAssigner"
"""Parts of the warnings with which Ultralytics says that memory was short."""


class _EndedError(Exception):
    """A training is ended by its callback."""


class _Record:
    """Measures a training by its callbacks.

    Args:
        until_failure: True to end the training with the first sign that memory was short.
        recompute: True to recompute every top-level layer in the backward pass.
        refuse_above: Number of images above which a batch fails as if memory were short, to try
            a benchmark without a GPU; 0 for none.
    """

    def __init__(self, *, until_failure: bool, recompute: bool, refuse_above: int) -> None:
        self._until_failure, self._recompute, self._refuse_above = until_failure, recompute, refuse_above
        self._begin, self._started, self._ooms = time.perf_counter(), 0.0, 0
        self._of_step: list[float] = []
        self.warnings: list[str] = []
        self.found: dict[str, Any] = {"epoch_end_s": [], "peaks_mib": [], "batch_peaks_mib": []}

    def attach(self, model: Any) -> None:
        """Add the callbacks to a `YOLO` object, and listen to the warnings of Ultralytics."""
        from ultralytics.utils import LOGGER

        LOGGER.addFilter(self._hear)
        for name in ("on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_train_epoch_end"):
            model.add_callback(name, getattr(self, name))

    def _hear(self, record: Any) -> bool:
        if record.levelno >= 30 and "memory" in (message := record.getMessage()).lower():
            self.warnings.append(message)
        return True

    def on_train_start(self, trainer: Any) -> None:
        """Begin to measure: the data set is read, and AutoBatch has chosen."""
        if self._recompute:
            from torch.utils.checkpoint import checkpoint

            for layer in trainer.model.model:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if self._refuse_above:
            trainer.preprocess_batch = functools.partial(self._preprocess, trainer.preprocess_batch)
        self._ooms = _allocator_failures()
        self._started = _now(trainer)
        self.found |= {"started_at": trainer.batch_size, "setup_s": self._started - self._begin}

    def _preprocess(self, stock: Any, batch: dict[str, Any]) -> dict[str, Any]:
        if len(batch["img"]) > self._refuse_above:
            raise RuntimeError("CPU out of memory (imitated)")
        made: dict[str, Any] = stock(batch)
        return made

    def on_train_epoch_start(self, trainer: Any) -> None:
        """Forget the step that an epoch did not finish, as Ultralytics does when it begins the epoch again."""
        self._of_step = []
        self._end_at_failure()

    def on_train_batch_end(self, trainer: Any) -> None:
        """Note the peak of a batch, and that of an optimizer step."""
        import torch

        self._end_at_failure()
        if trainer.device.type != "cuda":
            return
        self._of_step.append(torch.cuda.max_memory_allocated() / 2**20)
        torch.cuda.reset_peak_memory_stats()
        self.found["batch_peaks_mib"].append(self._of_step[-1])
        if len(self._of_step) >= trainer.accumulate:
            self.found["peaks_mib"].append(max(self._of_step))
            self._of_step = []

    def on_train_epoch_end(self, trainer: Any) -> None:
        """Note the time."""
        self.found["epoch_end_s"].append(_now(trainer) - self._started)

    def _end_at_failure(self) -> None:
        if self._until_failure and (self._count(HALVED) or self._count(ASSIGNED_SINGLY)):
            raise _EndedError

    def _count(self, words: str) -> int:
        return sum(words in line for line in self.warnings)

    def close(self, trainer: Any, failure: str | None) -> dict[str, Any]:
        """Return what was measured.

        Args:
            trainer: The trainer; None if there is none yet.
            failure: Message of the error that ended the training.
        """
        from ultralytics.utils import LOGGER

        LOGGER.removeFilter(self._hear)
        ends, batch_peaks = self.found["epoch_end_s"], self.found.pop("batch_peaks_mib")
        return {
            **self.found,
            "epoch_s": [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)],
            "batch_peak_mean_mib": statistics.mean(batch_peaks) if batch_peaks else None,
            "batch_peak_sd_mib": statistics.pstdev(batch_peaks) if batch_peaks else None,
            "ran_at": getattr(trainer, "batch_size", None),
            "batches_a_step": getattr(trainer, "accumulate", None),
            "halvings": self._count(HALVED),
            "assigner_fallbacks": self._count(ASSIGNED_SINGLY),
            "allocator_failures": _allocator_failures() - self._ooms,
            "warnings": [line[:200] for line in self.warnings[:8]],
            "failure": failure,
        }


def _allocator_failures() -> int:
    """Return how many allocations failed so far, with those that cuDNN or the engine answered."""
    import torch

    return int(torch.cuda.memory_stats().get("num_ooms", 0)) if torch.cuda.is_available() else 0


def _now(trainer: Any) -> float:
    if trainer.device.type == "cuda":
        import torch

        torch.cuda.synchronize(trainer.device)
    return time.perf_counter()


def imitate(total_mib: int, usable_mib: int, *, limited: bool) -> None:
    """Make this card a smaller one for PyTorch and Ultralytics in this process, as far as memory goes.

    Args:
        total_mib: Memory that PyTorch shall report.
        usable_mib: Memory without the CUDA context.
        limited: True to limit the allocator, and to report what is free inside of the limit; False if `mem_limit` does.
    """
    import torch

    real = torch.cuda.get_device_properties

    class Properties:
        """Properties of the smaller card, for Ultralytics' AutoBatch and for what it does at the end of an epoch."""

        total_memory = total_mib * 2**20

        def __init__(self, device: Any = None) -> None:
            self._real = real(device)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return max(usable_mib * 2**20 - torch.cuda.memory_reserved(device), 0), total_mib * 2**20

    if limited:
        limit_memory(usable_mib / 1024)
        torch.cuda.mem_get_info = mem_get_info
    torch.cuda.get_device_properties = Properties


def train(
    arguments: dict[str, Any],
    *,
    memory: dict[str, Any] | None = None,
    until_failure: bool = False,
    recompute: bool = False,
    refuse_above: int = 0,
) -> dict[str, Any]:
    """Train in this process, and return what was measured: times in seconds, and peaks of optimizer steps in MiB.

    Args:
        arguments: Arguments of the training, and `model`.
        memory: Arguments of `imitate`; None for the card as it is.
        until_failure: True to end the training with the first sign that memory was short.
        recompute: True to recompute every top-level layer in the backward pass.
        refuse_above: See `_Record`.
    """
    random.seed(0)
    is_stock = os.environ.get("YOLOV12_AUTOPATCH") == "0"
    if not is_stock:
        from yolov12 import autopatch

        autopatch.apply()
    from ultralytics import YOLO

    if memory is not None:
        imitate(**memory)
    model = YOLO(arguments.pop("model"))
    record = _Record(until_failure=until_failure, recompute=recompute, refuse_above=refuse_above)
    record.attach(model)
    failure = None
    try:
        model.train(**arguments)
    except _EndedError:
        pass
    except Exception as error:  # what it reached is a result, too
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}"[:400]
    assert not is_stock or "yolov12.seams" not in sys.modules, "this is not stock"
    return record.close(model.trainer or SimpleNamespace(), failure)
