"""What the engine cannot know about a training by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["NO_ADVICE", "Advice"]


@dataclass(frozen=True)
class Advice:
    """Knowledge of the training, for decisions and for the error of a run that does not fit."""

    ways_out: Callable[[float], Sequence[str]] = lambda fraction: ()
    """Returns what the user can do, cheapest first. The argument is the fraction of one image's activations that fits.
    """
    optimizer_bytes: Callable[[], int] = lambda: 0
    """Returns the bytes that the optimizer will allocate at its first update; 0 after it."""
    batches_left: Callable[[], float] = lambda: math.inf
    """Returns the number of batches until the end of the training, with the next one; infinity if it is unknown."""


NO_ADVICE = Advice()
