"""Memory and speed of common GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from yolov12.errors import ConfigError

__all__ = ["CARDS", "Card", "card"]

_MIB = 2**20


@dataclass(frozen=True)
class Card:
    """A model of GPU."""

    name: str
    total_bytes: int
    """Memory that `torch.cuda.mem_get_info` reports. The nominal memory is larger."""
    capability: tuple[int, int]
    """Compute capability, such as (9, 0)."""
    teraflops: float
    """Nominal 1e12 operations per second in half precision, without sparsity."""
    gigabytes_per_s: float
    """Nominal memory bandwidth, in 1e9 bytes per second."""
    integrated: bool = False
    """True if the GPU shares the host's memory, as on a Jetson."""

    @property
    def system_bytes(self) -> int:
        """Bytes that no process can allocate: the CUDA context, and on a Jetson the operating system."""
        return (450 + 2560 * self.integrated) * _MIB

    @property
    def attention(self) -> str:
        """Kernel of the attention in half precision."""
        if self.capability >= (8, 0):
            return "flash"
        return "memory-efficient (flash needs compute capability 8.0)"


CARDS: tuple[Card, ...] = (
    Card("GTX 1080 Ti", 11_172 * _MIB, (6, 1), 11.3, 484),
    Card("V100 16GB", 16_151 * _MIB, (7, 0), 125, 900),
    Card("V100 32GB", 32_494 * _MIB, (7, 0), 125, 900),
    Card("T4", 14_914 * _MIB, (7, 5), 65, 320),
    Card("RTX 2080 Ti", 11_012 * _MIB, (7, 5), 108, 616),
    Card("A100 40GB", 40_442 * _MIB, (8, 0), 312, 1555),
    Card("A100 80GB", 81_154 * _MIB, (8, 0), 312, 2039),
    Card("A10", 22_592 * _MIB, (8, 6), 125, 600),
    Card("RTX 3060", 12_045 * _MIB, (8, 6), 51, 360),
    Card("RTX 3090", 24_250 * _MIB, (8, 6), 142, 936),
    Card("RTX A6000", 48_541 * _MIB, (8, 6), 155, 768),
    Card("Jetson Orin Nano 8GB", 7_620 * _MIB, (8, 7), 10, 68, True),
    Card("Jetson Orin 32GB", 30_697 * _MIB, (8, 7), 54, 205, True),
    Card("Jetson Orin 64GB", 62_841 * _MIB, (8, 7), 85, 205, True),
    Card("L4", 22_478 * _MIB, (8, 9), 121, 300),
    Card("RTX 4090", 24_082 * _MIB, (8, 9), 165, 1008),
    Card("H100", 81_079 * _MIB, (9, 0), 989, 3350),
    Card("H200", 143_167 * _MIB, (9, 0), 989, 4800),
)


def card(name: str) -> Card:
    """Find a GPU by its name.

    Args:
        name: A name such as `t4`, `a100-80gb` or `RTX3090`. If it fits several GPUs, the smallest one is meant.

    Returns:
        The GPU.

    Raises:
        ConfigError: The name is unknown.
    """
    wanted = _plain(name)
    by_plain = {_plain(each.name): each for each in CARDS}
    if wanted in by_plain:
        return by_plain[wanted]
    for each in sorted(CARDS, key=lambda card: card.total_bytes):
        if len(wanted) > 2 and wanted in _plain(each.name):
            return each
    near = [by_plain[found].name for found in get_close_matches(wanted, by_plain, n=3, cutoff=0.4)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known are {', '.join(each.name for each in CARDS)}."
    raise ConfigError(f"gpu={name} is no card that is known. {hint} Or give mem=16GiB")


def _plain(name: str) -> str:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    for word in ("nvidia", "geforce", "tesla", "agx"):
        plain = plain.replace(word, "")
    return plain.removesuffix("gb") if plain.endswith("gb") else plain
