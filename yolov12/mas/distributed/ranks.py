"""Several processes, one batch: what they tell each other in a step, and the sums that make their gradients one.

Every process, or rank, runs its share of a batch by itself. It exchanges nothing in its forward and backward passes, so
an allocation that fails on one rank concerns that rank alone. Then all ranks report how it went, in one collective of a
few bytes on the host while devices still compute. Gradients are summed only if the step succeeded on every rank.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from yolov12.errors import DoesNotFitError, RankError
from yolov12.mas.distributed.watchdog import Watchdog

__all__ = ["ALONE", "NO_NEWS", "ProcessRanks", "RankStatus", "Ranks", "exchange_names", "telling"]

BUCKET_BYTES = 32 * 2**20
"""Size of the flat buffer in which gradients are summed, or less if they are smaller. It exists before ranks agree."""
_LOSS_NUMBERS = 64
"""Most normalisers, losses and items for which memory is reserved."""
_VERDICT_S = 45.0
"""Seconds to wait for the name of a rank that is gone."""
_DONE, _DOES_NOT_FIT, _FAILED = range(3)  # outcome of a rank's share, in the first column of the table they exchange

_Kind = tuple[torch.device, torch.dtype]


@dataclass(frozen=True)
class RankStatus:
    """Report of one rank to all others, once a step."""

    images: int = 0
    """Size of the rank's latest share with a known time; more if the host could have launched more in that time."""
    ms: float = math.nan
    """Milliseconds of the rank's own work on that share, without waiting for other ranks; NaN if nothing new is
    known."""
    stop: bool = False
    """True if this process was asked to stop."""
    checksum: int = 0
    """Checksum of the rank's weights; 0 if it was not computed."""
    groups: int = 0
    """Number of BatchNorm groups in the rank's share of this batch."""
    reached: int = 0
    """Digest of the parameters and layers that the rank's share has reached, see `reached.Reached`."""

    def after(self, groups: int, reached: int) -> RankStatus:
        """Return the report after a share of so many BatchNorm groups, which has reached what this digest says."""
        return replace(self, groups=groups, reached=reached)


NO_NEWS = RankStatus()


class Ranks(Protocol):
    """The processes that share each batch."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of processes."""
    alike: bool
    """True if all devices have the same name. Different ones may round an optimizer's step differently."""

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Allocate the memory that `sum` will need for such tensors."""

    def agree(self, status: RankStatus, failure: BaseException | None = None) -> Sequence[RankStatus]:
        """Report that this rank's share is done, or why it is not, and return what every rank reports.

        Args:
            status: Report of this rank.
            failure: Error that ended this rank's share; None if the share is done.

        Raises:
            DoesNotFitError: Not even one image fits on another rank.
            RankError: Another rank failed in another way, is gone, or has other weights.
        """

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place; shapes and order are the same on all of them."""

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have on rank 0."""

    def from_first(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that rank 0 gives, which are on the host."""

    def all(self, flag: bool) -> bool:
        """Return whether the flag is true on every rank."""

    def any(self, flags: Sequence[int]) -> Sequence[int]:
        """Return for each flag, 0 or 1, whether it is 1 on any rank; all ranks give the same number of flags."""

    def least(self, number: int) -> int:
        """Return the smallest number that a rank gives."""

    def saving(self) -> AbstractContextManager[None]:
        """Return a context in which the run is saved: it has time for that even if another rank is gone."""


class _Alone:
    """A training in one process."""

    rank, size, alike = 0, 1, True

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        pass

    def agree(self, status: RankStatus, failure: BaseException | None = None) -> Sequence[RankStatus]:
        return (status,)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        pass

    def from_first(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
        return value

    def all(self, flag: bool) -> bool:
        return flag

    def any(self, flags: Sequence[int]) -> Sequence[int]:
        return flags

    def least(self, number: int) -> int:
        return number

    def saving(self) -> AbstractContextManager[None]:
        return nullcontext()


ALONE: Ranks = _Alone()
"""Ranks of a training in one process."""


@contextmanager
def telling(ranks: Ranks, status: RankStatus, unless: type[Exception]) -> Iterator[None]:
    """Report an error of this rank to the others before it is raised.

    Args:
        ranks: Processes that share each batch.
        status: Report of this rank.
        unless: Error that is not reported, as all ranks raise it.
    """
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        ranks.agree(status, error)
        raise


def exchange_names() -> list[str]:
    """Return the name of every rank as messages show it, rank 0 first. A collective."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, f"rank {dist.get_rank()} ({socket.gethostname()})")
    return names


class ProcessRanks:
    """Ranks of torch.distributed, whose default group sums tensors of the host and of the device.

    Args:
        watchdog: Watchdog that names a rank that is gone, and passes error messages on.
        alike: See `Ranks.alike`.
    """

    def __init__(self, watchdog: Watchdog, *, alike: bool = True) -> None:
        self.rank, self.size, self.alike = dist.get_rank(), dist.get_world_size(), alike
        self._watchdog = watchdog
        self._flat: dict[_Kind, Tensor] = {}

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.reserve`. There is room for the numbers of a loss, too, which are summed in double precision."""
        for kind, of_kind in _by_kind(tensors).items():
            self._buffer(kind, of_kind)
            double = kind[0], torch.float64
            if double not in self._flat:
                self._flat[double] = torch.empty(_LOSS_NUMBERS, device=kind[0], dtype=torch.float64)

    def agree(self, status: RankStatus, failure: BaseException | None = None) -> Sequence[RankStatus]:
        """See `Ranks.agree`."""
        outcome = _DONE if failure is None else _DOES_NOT_FIT if isinstance(failure, DoesNotFitError) else _FAILED
        if failure is not None:
            self._watchdog.tell(str(failure) or type(failure).__name__)
        row = outcome, status.images, status.ms, status.stop, status.checksum, status.groups, status.reached
        table = torch.zeros(self.size, len(row), dtype=torch.float64)
        table[self.rank] = torch.tensor(row, dtype=torch.float64)  # all other rows are zeros: the sum is exact
        with self._naming_the_lost():
            dist.all_reduce(table)
        outcomes, rows = table[:, 0].tolist(), table[:, 1:].tolist()
        statuses = [RankStatus(int(images), ms, bool(stop), *map(int, others)) for images, ms, stop, *others in rows]
        for kind, error in ((_FAILED, RankError), (_DOES_NOT_FIT, DoesNotFitError)):
            if kind in outcomes:
                rank = outcomes.index(kind)
                if rank != self.rank and (failure is None or kind != outcome):
                    raise error(f"{self._watchdog.names[rank]}: {self._watchdog.told(rank)}")
                break
        if failure is None:  # with one, a rank may not have come to its checksum
            self._compare([each.checksum for each in statuses])
        return statuses

    def _compare(self, checksums: Sequence[int]) -> None:
        if len(set(checksums)) == 1:
            return
        usual = max(checksums, key=checksums.count)
        other = next(rank for rank, checksum in enumerate(checksums) if checksum != usual)
        raise RankError(
            f"{self._watchdog.names[other]} has other weights than the other ranks: memory or a link of its machine "
            "may be faulty. resume=True continues from the last save"
        )

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.sum`. Tensors go through a flat buffer, as many at once as it holds."""
        for kind, of_kind in _by_kind(tensors).items():
            flat = self._buffer(kind, of_kind)
            with self._naming_the_lost():
                for bucket in _buckets(of_kind, flat.numel()):
                    numbers = [tensor.numel() for tensor in bucket]
                    used = flat[: sum(numbers)]
                    views = [view.view_as(tensor) for view, tensor in zip(used.split(numbers), bucket, strict=True)]
                    torch._foreach_copy_(views, bucket)
                    dist.all_reduce(used)
                    torch._foreach_copy_(bucket, views)

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.copy_from_first`."""
        with self._naming_the_lost():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def from_first(self, value: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Ranks.from_first`."""
        box: list[Any] = [value]
        with self._naming_the_lost():
            dist.broadcast_object_list(box, 0)
        return dict(box[0])

    def _buffer(self, kind: _Kind, tensors: Sequence[Tensor]) -> Tensor:
        numbers = [tensor.numel() for tensor in tensors]
        most = max(*numbers, min(sum(numbers), BUCKET_BYTES // tensors[0].element_size()))
        if kind not in self._flat or self._flat[kind].numel() < most:
            self._flat[kind] = torch.empty(most, device=kind[0], dtype=kind[1])
        return self._flat[kind]

    def all(self, flag: bool) -> bool:
        """See `Ranks.all`."""
        return bool(self.least(int(flag)))

    def any(self, flags: Sequence[int]) -> Sequence[int]:
        """See `Ranks.any`."""
        found = torch.tensor(flags, dtype=torch.uint8)
        with self._naming_the_lost():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [int(flag) for flag in found.tolist()]

    def least(self, number: int) -> int:
        """See `Ranks.least`."""
        numbers = torch.tensor(number)
        with self._naming_the_lost():
            dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers)

    def saving(self) -> AbstractContextManager[None]:
        """See `Ranks.saving`."""
        return self._watchdog.saving()

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.blame(error) from error

    def blame(self, error: RuntimeError) -> RankError:
        """Return an error that names the rank that is gone. Errors of gloo and NCCL speak of sockets.

        Args:
            error: Error of a collective.
        """
        gone = self._watchdog.gone(_VERDICT_S) or f"a rank does not answer ({str(error).splitlines()[0]})"
        return RankError(f"{gone}. resume=True continues from the last save; with resume=auto a restart does")


def _by_kind(tensors: Sequence[Tensor]) -> dict[_Kind, list[Tensor]]:
    by_kind: dict[_Kind, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return by_kind


def _buckets(tensors: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if numbers + tensor.numel() > most:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    yield bucket
