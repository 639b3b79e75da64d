"""Statistics of samples: summaries, and how sure a ratio of two medians is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from djinn_fx.benchmarks.record import Json

Item = TypeVar("Item")


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """The items from another one on in each turn, so that none always comes first."""
    start = turn % max(1, len(items))
    return [*items[start:], *items[:start]]


def summary(samples: Sequence[float], unit: str) -> dict[str, Json]:
    """Median, 95th percentile, mean, extremes and deviation, with the samples themselves.

    Raises:
        ValueError: no samples.
    """
    if not len(samples):
        raise ValueError("a summary needs at least one sample.")
    values = np.asarray(samples, dtype=np.float64)
    return {
        "unit": unit,
        "median": _short(np.median(values)),
        "p95": _short(np.percentile(values, 95)),
        "mean": _short(values.mean()),
        "min": _short(values.min()),
        "max": _short(values.max()),
        "std": _short(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "count": len(values),
        "samples": [_short(value) for value in values],
    }


def overhead(
    base: Sequence[float], other: Sequence[float], *, seed: int = 0, draws: int = 4000, stretch: int = 8
) -> dict[str, Json]:
    """By how much ``other`` is slower than ``base``, as a fraction, with a 95 % bootstrap interval.

    Both were sampled in turns: ``base[i]`` and ``other[i]`` lie next to each other in time. The statistic is the ratio
    of the two medians, less one. Rounds are drawn anew in contiguous stretches (a moving-block bootstrap), so that a
    drift of clocks or temperature, which neighbouring rounds share, widens the interval instead of hiding in it.

    Args:
        base: samples without what is measured.
        other: samples with it, as many.
        seed: of the draws.
        draws: how many resamples.
        stretch: rounds per stretch.

    Raises:
        ValueError: fewer than two rounds, or unequal numbers.
    """
    if len(base) != len(other) or len(base) < 2:
        raise ValueError(f"an overhead needs two or more pairs of samples; there are {len(base)} and {len(other)}.")
    first, second = (np.asarray(samples, dtype=np.float64) for samples in (base, other))
    count = len(first)
    stretch = max(1, min(stretch, count // 4))
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, count, size=(draws, -(-count // stretch)))
    index = (starts[:, :, None] + np.arange(stretch)).reshape(draws, -1)[:, :count] % count
    ratios = np.median(second[index], axis=1) / np.median(first[index], axis=1) - 1
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {
        "overhead": _short(np.median(second) / np.median(first) - 1),
        "low": _short(low),
        "high": _short(high),
        "half_width": _short((high - low) / 2),
        "rounds": count,
    }


def rounds_overheads(base: Sequence[float], other: Sequence[float], groups: int = 9) -> dict[str, Json]:
    """Mean, extremes and deviation of the overhead over consecutive groups of rounds, as trials report it."""
    first, second = (np.asarray(samples, dtype=np.float64) for samples in (base, other))
    groups = max(1, min(groups, len(first) // 2))
    pairs = zip(np.array_split(first, groups), np.array_split(second, groups), strict=True)
    values = np.array([np.median(b) / np.median(a) - 1 for a, b in pairs])
    return {
        "groups": groups,
        "mean": _short(values.mean()),
        "max": _short(values.max()),
        "min": _short(values.min()),
        "std": _short(values.std(ddof=1)) if groups > 1 else 0.0,
    }


def _short(value: Any) -> float:
    """Seven digits: more than any clock here has."""
    return float(f"{float(value):.7g}")
