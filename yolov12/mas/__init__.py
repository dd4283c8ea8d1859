"""Training steps that fit into whatever memory is free, with the gradient of the whole batch.

Needs torch, NumPy and SciPy, and no Ultralytics. See docs/engine.md for a page that uses it on a model of one's own.
"""

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.mas.config import Config
from yolov12.mas.engine import Engine
from yolov12.mas.journal.journal import Journal
from yolov12.mas.step.step import Result
from yolov12.mas.task import Loss, Task, TensorTask, Workload

__all__ = [
    "Config",
    "ConfigError",
    "DoesNotFitError",
    "Engine",
    "Journal",
    "Loss",
    "Result",
    "Task",
    "TensorTask",
    "Workload",
]
