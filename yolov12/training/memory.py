"""Puts the memory-aware engine into an Ultralytics trainer that has just been set up.

Nothing of Ultralytics is replaced: its loop calls `trainer.model`, `preprocess_batch`, `optimizer_step` and a few
others, and on this one trainer they are now ours, and call its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from yolov12.mas import Config, Engine, Journal
from yolov12.mas.update import Undo, copy_on_host
from yolov12.training.detection import DetectionTask

__all__ = ["attach"]

_MODELS = ("DetectionModel", "OBBModel", "SegmentationModel", "PoseModel")
_WIDTH = 22  # of the progress bar's column


def attach(trainer: Any) -> None:
    """Let the engine run this trainer's batches, unless `mas=False` or the training is of a kind it does not know."""
    from ultralytics.utils import LOGGER, YAML
    from ultralytics.utils.torch_utils import unwrap_model

    if not getattr(trainer.args, "mas", True):
        return
    model = unwrap_model(trainer.model)
    if (reason := _why_not(trainer, model)) is not None:
        LOGGER.info(f"memory: {reason}: batches run as Ultralytics runs them")
        return

    task = DetectionTask(
        model,
        trainer.preprocess_batch,
        multi_scale=trainer.args.multi_scale > 0,
        overlapping_masks=trainer.args.overlap_mask,
    )
    if not task.exact:
        LOGGER.info("memory: parts of a batch are weighted by images, as this loss is not divided by one sum")
    engine = Engine(
        model,
        task,
        Config.parse(vars(trainer.args)),
        journal=Journal(trainer.save_dir, resume=bool(trainer.resume)),
        backward=lambda loss: trainer.scaler.scale(loss).backward(),
        ways_out=lambda share: _ways_out(trainer, share),
        log=LOGGER.info,
    )
    asked = 0

    def run(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        result = engine.step(batch)
        if trainer.args.bn_group != engine.bn_group:  # fixed for the run, and for those that resume or repeat it
            trainer.args.bn_group = engine.bn_group
            file = trainer.save_dir / "args.yaml"
            YAML.save(file, {**YAML.load(file), "bn_group": engine.bn_group})
        # A leaf: Ultralytics' own backward has nothing left to do.
        return result.loss.requires_grad_(), dict(result.items)

    def update() -> None:
        nonlocal asked
        asked += 1
        engine.update(trainer.optimizer, stock_update, lambda: _remember(trainer))

    def validate() -> Any:
        metrics, fitness = stock_validate()
        return (metrics if metrics is None else {**metrics, **_metrics(engine)}), fitness

    def epoch_starts(trainer: Any) -> None:
        engine.epoch = trainer.epoch + 1

    def epoch_ends(trainer: Any) -> None:
        trainer.metrics = {**trainer.metrics, **_metrics(engine)}

    def finish(trainer: Any) -> None:
        summary = engine.close(updates_expected=asked)
        if summary is not None:
            LOGGER.info(summary.as_text())

    stock_update, stock_validate = trainer.optimizer_step, trainer.validate
    stock_memory, stock_header = trainer._get_memory, trainer.progress_string
    trainer.model = _Wrapper(model, run)
    trainer.preprocess_batch = lambda batch: batch  # it stays on the host until its part is due
    trainer.optimizer_step = update
    trainer.validate = validate
    trainer._get_memory = lambda fraction=False: stock_memory(fraction) if fraction else _Column(engine)
    trainer.progress_string = lambda: stock_header().replace(f"{'GPU_mem':>11}", f"{'GPU_mem':>{_WIDTH}}", 1)
    trainer.add_callback("on_train_epoch_start", epoch_starts)
    trainer.add_callback("on_train_epoch_end", epoch_ends)
    trainer.add_callback("teardown", finish)


class _Wrapper(nn.Module):
    """Stands where DistributedDataParallel would: `unwrap_model` sees through it, checkpoints never hold it."""

    def __init__(self, module: nn.Module, run: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self._run = module, run

    def forward(self, batch: Any) -> Any:
        return self._run(batch) if self.training and isinstance(batch, dict) else self.module(batch)

    def __getattr__(self, name: str) -> Any:  # for callbacks that look into the model
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class _Column(float):
    """Peak/budget in GiB and micro-batch × count, where the progress bar formats a number before a `G`."""

    def __new__(cls, engine: Engine) -> _Column:
        column = super().__new__(cls, engine.latest.peak_bytes / 2**30 if engine.latest else 0.0)
        column._engine = engine
        return column

    _engine: Engine

    def __format__(self, spec: str) -> str:
        if self._engine.latest is None:
            return super().__format__(spec)
        sizes, budget = self._engine.micro_batches, self._engine.latest.budget_bytes / 2**30
        return f"{max(sizes)}x{len(sizes)}  {float(self):.3g}/{budget:.3g}".rjust(_WIDTH - 1)


def _why_not(trainer: Any, model: nn.Module) -> str | None:
    if trainer.world_size > 1:
        return "several GPUs are not shared out yet"
    if trainer.device.type not in ("cuda", "cpu"):
        return f"{trainer.device.type} devices do not tell their memory"
    for name in ("compile", "distill_model", "quantize"):
        if getattr(trainer.args, name, None):
            return f"{name} is set"
    if type(model).__name__ not in _MODELS:
        return f"{type(model).__name__} is not split up"
    return None


def _metrics(engine: Engine) -> dict[str, float]:
    """For results.csv and every logger."""
    if engine.latest is None:
        return {}
    return {
        "memory/peak_MiB": round(engine.latest.peak_bytes / 2**20, 1),
        "memory/budget_MiB": round(engine.latest.budget_bytes / 2**20, 1),
        "memory/micro_batch": max(engine.micro_batches),
    }


def _remember(trainer: Any) -> Undo:
    """What an optimizer step changes besides parameters and optimizer."""
    scaler = copy.deepcopy(trainer.scaler)
    ema = trainer.ema
    updates = ema.updates if ema else 0
    values = copy_on_host(list(ema.ema.state_dict().values()) if ema else [])

    def undo() -> None:
        trainer.scaler = scaler
        if ema:
            ema.updates = updates
        values()

    return undo


def _ways_out(trainer: Any, share: float) -> Sequence[str]:
    size = int(trainer.args.imgsz * math.sqrt(share)) // trainer.stride * trainer.stride
    smaller = [f"imgsz={size}"] if trainer.stride <= size < trainer.args.imgsz else []
    amp = [] if trainer.amp or trainer.device.type == "cpu" else ["amp=True"]
    return [*amp, *smaller]
