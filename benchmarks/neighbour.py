"""A process that takes and releases memory at random, until its standard input is closed.

    python benchmarks/neighbour.py DEVICE POOL LOW HIGH SEED

On a GPU it first takes all but POOL MiB of what is free, so that the card is as small as that for everybody. Then it
holds between LOW and HIGH MiB, another amount every few seconds, and leaves at least 1 GiB of a GPU free. On `cpu` it
uses the memory of the host, and POOL has no meaning. Each line that it prints is a JSON list of the seconds since it
began and the MiB that it holds.
"""

from __future__ import annotations

import json
import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK_MIB = 256
LEFT_MIB = 1024  # of a GPU: a training that has no memory at all could only wait
SECONDS = (1.0, 5.0)  # between two changes


def main(device: str, pool_mib: int, low_mib: int, high_mib: int, seed: int) -> None:
    """Take and release memory: see the module."""
    memory = _Host() if device == "cpu" else _Gpu(device)
    chance, begun = random.Random(seed), time.monotonic()
    ballast = memory.take((memory.free_mib() - pool_mib) // BLOCK_MIB) if device != "cpu" else []
    held: list[Any] = []
    while True:
        wanted = chance.randint(low_mib, high_mib) // BLOCK_MIB
        del held[wanted:]
        memory.release()
        held += memory.take(wanted - len(held))
        print(json.dumps([round(time.monotonic() - begun, 1), len(held) * BLOCK_MIB]), flush=True)
        if select.select([sys.stdin], [], [], chance.uniform(*SECONDS))[0]:
            break
    del ballast, held


@contextmanager
def beside(log: Path, *arguments: Any) -> Iterator[None]:
    """Return a context in which the process runs.

    Args:
        log: File for what it prints.
        arguments: Arguments of `main`.
    """
    with log.open("wb") as output:
        command = [sys.executable, __file__, *map(str, arguments)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output)
    try:
        yield
    finally:
        process.communicate()  # closes its standard input, at which it ends


def held(log: Path) -> dict[str, int]:
    """Return how often the process changed what it held, and the least and most MiB."""
    mib = [json.loads(line)[1] for line in log.read_text().splitlines()]
    return {"changes": len(mib), "least": min(mib, default=0), "most": max(mib, default=0)}


class _Host:
    def release(self) -> None:
        """Do nothing: what is deleted goes back to the system."""

    def take(self, blocks: int) -> list[Any]:
        return [bytearray(b"\1") * (BLOCK_MIB << 20) for _ in range(blocks)]  # written to, so they are really there


class _Gpu:
    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(f"cuda:{device}")

    def release(self) -> None:
        """Return to the card what was deleted."""
        self._torch.cuda.empty_cache()

    def free_mib(self) -> int:
        """Return the free memory of the card."""
        return int(self._torch.cuda.mem_get_info(self._device)[0]) >> 20

    def total_mib(self) -> int:
        """Return the memory of the card."""
        return int(self._torch.cuda.mem_get_info(self._device)[1]) >> 20

    def take(self, blocks: int) -> list[Any]:
        """Allocate blocks, as long as enough is left."""
        taken = []
        for _ in range(blocks):
            if self.free_mib() < BLOCK_MIB + LEFT_MIB:
                break
            try:
                taken.append(self._torch.empty(BLOCK_MIB << 20, dtype=self._torch.uint8, device=self._device))
            except self._torch.cuda.OutOfMemoryError:
                break  # the training has just allocated it
        return taken


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
