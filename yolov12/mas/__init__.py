"""Memory-aware scheduling (MAS): training steps that fit into whatever memory is free, with the exact gradient.

Needs torch, NumPy and SciPy, and no Ultralytics. docs/guides/python.md uses it on a model of your own.
"""

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.mas.config import Config
from yolov12.mas.engine import Engine
from yolov12.mas.journal.journal import Journal
from yolov12.mas.scheduling.planner import Advice
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
