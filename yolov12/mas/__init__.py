"""Memory-aware scheduling (MAS): training steps that fit into whatever memory is free, with the exact gradient.

Needs torch, NumPy and SciPy, and no Ultralytics. docs/guides/python.md uses it on a model of your own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolov12.errors import ConfigError, DoesNotFitError
    from yolov12.mas.config import Config
    from yolov12.mas.engine import Engine
    from yolov12.mas.journal.journal import Journal
    from yolov12.mas.scheduling.advice import Advice
    from yolov12.mas.step.result import Result
    from yolov12.mas.task import Loss, Share, Task, TensorTask, Workload

__all__ = [
    "Advice",
    "Config",
    "ConfigError",
    "DoesNotFitError",
    "Engine",
    "Journal",
    "Loss",
    "Result",
    "Share",
    "Task",
    "TensorTask",
    "Workload",
]

_MODULES = {
    "Advice": "mas.scheduling.advice",
    "Config": "mas.config",
    "ConfigError": "errors",
    "DoesNotFitError": "errors",
    "Engine": "mas.engine",
    "Journal": "mas.journal.journal",
    "Result": "mas.step.result",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `yolov12 monitor` reads journals without torch.
    if name in __all__:
        return getattr(import_module(f"yolov12.{_MODULES.get(name, 'mas.task')}"), name)
    raise AttributeError(f"module 'yolov12.mas' has no attribute {name!r}")
