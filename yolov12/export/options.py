"""Export arguments that Ultralytics does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["OPTIONS"]

OPTIONS: Mapping[str, Any] = {"engine_builder": "auto"}
"""With their defaults, as users write them. `mem_limit` and `mem_safety_ratio` are the engine's (mas.config)."""
