"""Comparison of the trainings of benchmarks/accuracy.py with those of stock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy_settings import STOCK, VARIANTS


def name_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a training from others."""
    return tuple(row[key] for key in ("data", "model", "variant", "seed"))


def with_row(rows: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the row of a training. Of several that were cut off, only the longest stays, and none beside one that ended.

    Args:
        rows: The rows so far.
        new: The new one.
    """
    cut_off = [row for row in rows if "map_so_far" in row and name_of(row) == name_of(new)]
    others = [row for row in rows if row not in cut_off]
    if "map" in new:
        return [*others, new]
    if "map_so_far" in new:
        return [*others, max([*cut_off, new], key=lambda row: len(row["map_so_far"]))]
    return [*rows, new]


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the last epochs of this package's variants with those of stock.

    Args:
        rows: Rows of trainings; those that failed count nowhere.
    """
    last: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in sorted((row for row in rows if "map" in row), key=lambda row: row["seed"]):
        last.setdefault((row["data"], row["model"]), {}).setdefault(row["variant"], []).append(row["map"][-1])
    found = []
    for (data, model), of in last.items():
        for variant in (each for each in VARIANTS if each in of):
            line: dict[str, Any] = {"data": data, "model": model, "variant": variant, "map": of[variant]}
            line |= {"mean": round(statistics.mean(of[variant]), 5)}
            if len(of[variant]) > 1:
                line["sd"] = round(statistics.stdev(of[variant]), 5)
                others = [each for each in STOCK if variant not in STOCK and len(of.get(each, ())) > 1]
                line |= {f"against_{other}": difference(of[variant], of[other]) for other in others}
            found.append(line)
    return found


def difference(ours: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    """Return the difference of two means, and half the width of its 95 % confidence interval (Welch).

    Args:
        ours: A figure of each training.
        stock: That of the trainings to compare with.
    """
    from scipy.special import stdtrit

    parts = [(statistics.variance(each) / len(each), len(each) - 1) for each in (ours, stock)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / (sum(part**2 / freedom for part, freedom in parts) or 1)
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(variance) if variance else 0.0
    return {"difference": round(statistics.mean(ours) - statistics.mean(stock), 5), "interval": round(half, 5)}
