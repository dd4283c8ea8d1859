"""Export arguments that Ultralytics does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yolov12.cfg.arguments import EXPORT, defaults

__all__ = ["OPTIONS"]

OPTIONS: Mapping[str, Any] = defaults(EXPORT)
"""Defaults of export arguments, by the names that users write. `mem_limit` and `mem_safety_ratio` are the engine's."""
