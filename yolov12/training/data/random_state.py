"""State of what loading an image draws from and leaves behind in a process: random generators and kept images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "set_random_state", "without_trace"]


def random_state() -> dict[str, Any]:
    """Return the state of this process's random generators, in a form for `torch.load(weights_only=True)`."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - Ultralytics draws from it
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the result of `random_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])


@contextmanager
def without_trace(dataset: Any) -> Iterator[None]:
    """Restore the random generators, and the images that a data set keeps in memory."""
    state, names = random_state(), ("buffer", "ims", "im_hw0", "im_hw")
    kept = [(value, list(value)) for name in names if isinstance(value := getattr(dataset, name, None), list)]
    try:
        yield
    finally:
        set_random_state(state)
        for value, before in kept:
            value[:] = before
