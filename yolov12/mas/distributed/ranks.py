"""Several processes, one batch: what they tell each other in a step, and the sums that make their gradients one.

Every process, or rank, runs its share of a batch by itself, with nothing exchanged in its forward and backward passes,
so that an allocation that fails on one is that rank's own business. Then all say how it went, in one collective of a
few bytes on the host, while devices still compute; and only if it went well everywhere are gradients added up.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from yolov12.errors import DoesNotFitError, RankError
from yolov12.mas.distributed.watchdog import Lookout

__all__ = ["ALONE", "ProcessRanks", "Ranks", "Said", "exchange_names"]

BUCKET_BYTES = 32 * 2**20
"""Of the flat buffer in which gradients are added up, or less if they are less. It is there before ranks agree."""
_VERDICT_S = 45.0
"""How long to wait for the name of a rank that is gone."""
_FINE, _DOES_NOT_FIT, _FAILED = range(3)

_Kind = tuple[torch.device, torch.dtype]


@dataclass
class Said:
    """What a rank says once a step."""

    images: int = 0
    """Of the last share of it whose time is known; or more, where so many would have taken no longer."""
    ms: float = math.nan
    """That its own work on this share took, without waiting for others; not a number where nothing new is known."""
    stop: bool = False
    """Whether it was asked to stop."""
    checksum: int = 0
    """Of its replica; 0 where it was not taken."""


class Ranks(Protocol):
    """The processes that share each batch."""

    rank: int
    """Which one this is, from 0."""
    size: int
    """How many there are."""
    alike: bool
    """Whether all have devices of one name: others may round an optimizer's step otherwise."""
    said: Sequence[Said]
    """By every rank in the last `agree`."""
    say: Said
    """What this one says in the next."""

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Take the memory that `sum` will need for such tensors."""

    def agree(self, failure: BaseException | None = None) -> None:
        """Say that this rank's share is done, or why it is not, and hear the others.

        Raises:
            DoesNotFitError: On another rank not even one image fits.
            RankError: Another rank failed in another way, or is gone.
        """

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over all ranks, in place; of the same shapes and order on all of them."""

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have on rank 0."""

    def all(self, flag: bool) -> bool:
        """Whether it is true on every rank."""

    def least(self, number: int) -> int:
        """The smallest of what the ranks give."""


class _Alone:
    """One process."""

    rank, size, alike = 0, 1, True
    said: Sequence[Said] = ()
    say = Said()

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        pass

    def agree(self, failure: BaseException | None = None) -> None:
        pass

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        pass

    def all(self, flag: bool) -> bool:
        return flag

    def least(self, number: int) -> int:
        return number


ALONE: Ranks = _Alone()
"""A training in one process."""


def exchange_names() -> list[str]:
    """Rank → what messages call it."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, f"rank {dist.get_rank()} ({socket.gethostname()})")
    return names


class ProcessRanks:
    """Ranks of torch.distributed, whose default group adds up tensors of the host and of the device.

    Args:
        lookout: Says who is gone where a collective fails, and passes on what a number cannot say.
        alike: See `Ranks.alike`.
    """

    def __init__(self, lookout: Lookout, *, alike: bool = True) -> None:
        self.rank, self.size, self.alike = dist.get_rank(), dist.get_world_size(), alike
        self.said: Sequence[Said] = ()
        self.say = Said()
        self._lookout = lookout
        self._flat: dict[_Kind, Tensor] = {}

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.reserve`."""
        for kind, of_kind in _by_kind(tensors).items():
            self._buffer(kind, of_kind)

    def agree(self, failure: BaseException | None = None) -> None:
        """See `Ranks.agree`."""
        state = _FINE if failure is None else _DOES_NOT_FIT if isinstance(failure, DoesNotFitError) else _FAILED
        if failure is not None:
            self._lookout.tell(str(failure) or type(failure).__name__)
        say, self.say = self.say, Said()
        table = torch.zeros(self.size, 5, dtype=torch.float64)  # all rows but one's own are zeros: the sum is exact
        table[self.rank] = torch.tensor([state, say.images, say.ms, say.stop, say.checksum], dtype=torch.float64)
        with self._naming_the_lost():
            dist.all_reduce(table)
        states, rows = table[:, 0].tolist(), table[:, 1:].tolist()
        self.said = [Said(int(images), ms, bool(stop), int(checksum)) for images, ms, stop, checksum in rows]
        for kind, error in ((_FAILED, RankError), (_DOES_NOT_FIT, DoesNotFitError)):
            if kind in states:
                rank = states.index(kind)
                if rank != self.rank and (failure is None or kind != state):
                    raise error(f"{self._lookout.names[rank]}: {self._lookout.told(rank)}")
                break
        self._compare()

    def _compare(self) -> None:
        checksums = [said.checksum for said in self.said]
        if len(set(checksums)) == 1:
            return
        usual = max(checksums, key=checksums.count)
        other = next(rank for rank, checksum in enumerate(checksums) if checksum != usual)
        raise RankError(
            f"{self._lookout.names[other]} has other weights than the others have: memory or a link of its machine may "
            "be faulty. resume=True goes on from the last save"
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

    def _buffer(self, kind: _Kind, tensors: Sequence[Tensor]) -> Tensor:
        numbers = [tensor.numel() for tensor in tensors]
        most = max(*numbers, min(sum(numbers), BUCKET_BYTES // tensors[0].element_size()))
        if kind not in self._flat or self._flat[kind].numel() < most:
            self._flat[kind] = torch.empty(most, device=kind[0], dtype=kind[1])
        return self._flat[kind]

    def all(self, flag: bool) -> bool:
        """See `Ranks.all`."""
        return bool(self.least(int(flag)))

    def least(self, number: int) -> int:
        """See `Ranks.least`."""
        numbers = torch.tensor(number)
        with self._naming_the_lost():
            dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers)

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.blame(error) from error

    def blame(self, error: RuntimeError) -> RankError:
        """Say who is gone, where a collective failed: gloo and NCCL tell of sockets."""
        gone = self._lookout.gone(_VERDICT_S) or f"a rank does not answer ({str(error).splitlines()[0]})"
        return RankError(f"{gone}. resume=True goes on from the last save, and resume=auto by itself")


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
