"""Comparison of the trainings of benchmarks/accuracy.py with those of stock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy_settings import STOCK, VARIANTS


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
