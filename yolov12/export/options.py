"""Export arguments that Ultralytics does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["OPTIONS"]

OPTIONS: Mapping[str, Any] = {"engine_builder": "auto"}
"""Argument name → default, as users write it. `mem_limit` and `mem_safety_ratio` are arguments of the training engine,
which exports have too (see mas/config.py)."""
