"""Images that cannot be moved out of the inbox, such as those of another user."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Stuck"]

_FIRST_RETRY_S, _LONGEST_RETRY_S = 5.0, 600.0


@dataclass(frozen=True)
class _Failure:
    reason: str
    pause_s: float
    retry_at: float  # seconds since 1970


class Stuck:
    """Images that could not be taken. They are tried again after longer and longer: each try reads and writes."""

    def __init__(self) -> None:
        self._failures: dict[Path, _Failure] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def __contains__(self, image: Path) -> bool:
        return image in self._failures

    def rank(self, image: Path, now: float) -> int:
        """Return a rank by which images are sorted: those that never failed come first, those that wait last.

        Args:
            image: An image in the inbox.
            now: Seconds since 1970.
        """
        return (image in self._failures) + self.waits(image, now)

    @property
    def reasons(self) -> list[str]:
        """Why images could not be taken, one sentence for each."""
        return [failure.reason for failure in self._failures.values()]

    def add(self, image: Path, reason: str, now: float) -> None:
        """Note that an image could not be taken.

        Args:
            image: The image.
            reason: Sentence for the log.
            now: Seconds since 1970.
        """
        last = self._failures.get(image)
        pause_s = min(2 * last.pause_s, _LONGEST_RETRY_S) if last else _FIRST_RETRY_S
        self._failures[image] = _Failure(reason, pause_s, now + pause_s)

    def remove(self, image: Path) -> None:
        """Note that an image was taken, or that somebody else took it away."""
        self._failures.pop(image, None)

    def keep(self, images: Iterable[Path]) -> None:
        """Forget all other images.

        Args:
            images: Images that are still in the inbox.
        """
        there = set(images)
        self._failures = {image: failure for image, failure in self._failures.items() if image in there}

    def waits(self, image: Path, now: float) -> bool:
        """Return True if it is too early for another try.

        Args:
            image: The image.
            now: Seconds since 1970. A clock that was set back does not delay a try for ever.
        """
        failure = self._failures.get(image)
        return failure is not None and now < failure.retry_at <= now + _LONGEST_RETRY_S
