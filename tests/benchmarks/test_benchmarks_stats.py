"""Statistics on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from djinn_fx.benchmarks.stats import overhead, rounds_overheads, summary


def test_summary_of_known_samples() -> None:
    found = summary([4.0, 1.0, 3.0, 2.0], "ms")
    assert (found["median"], found["min"], found["max"], found["mean"]) == (2.5, 1.0, 4.0, 2.5)
    assert found["p95"] == pytest.approx(3.85)
    assert found["std"] == pytest.approx(1.290994)
    assert found["samples"] == [4.0, 1.0, 3.0, 2.0] and found["unit"] == "ms"


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        summary([], "ms")


@pytest.mark.parametrize("true", [0.0, 0.0024, 0.05])
def test_interval_holds_the_true_overhead(true: float) -> None:
    noise = np.random.default_rng(3)
    base = 1 + 0.002 * noise.standard_normal(240)
    other = (1 + true) * (1 + 0.002 * noise.standard_normal(240))
    found = overhead(list(base), list(other))
    assert found["low"] <= true <= found["high"]
    assert found["half_width"] < 0.0012  # enough rounds to tell 0.24 % from nothing
    assert found["low"] <= found["overhead"] <= found["high"]


def test_a_shared_drift_is_no_overhead() -> None:
    noise = np.random.default_rng(4)
    drift = np.linspace(1, 1.3, 200)
    base = drift * (1 + 0.001 * noise.standard_normal(200))
    other = drift * (1 + 0.001 * noise.standard_normal(200))
    found = overhead(list(base), list(other))
    assert found["low"] < 0 < found["high"] and found["half_width"] < 0.01


def test_noise_too_large_is_seen() -> None:
    noise = np.random.default_rng(5)
    base, other = (1 + 0.1 * noise.standard_normal(40) for _ in range(2))
    assert overhead(list(base), list(other))["half_width"] > 0.0024


def test_the_interval_is_reproducible() -> None:
    base, other = [1.0, 1.1, 1.2, 1.0, 1.1], [1.2, 1.1, 1.3, 1.2, 1.1]
    assert overhead(base, other, seed=1) == overhead(base, other, seed=1)


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        overhead([1.0, 2.0], [1.0])


def test_groups_of_rounds() -> None:
    found = rounds_overheads([1.0] * 18, [1.1] * 9 + [1.2] * 9, groups=2)
    assert found["mean"] == pytest.approx(0.15) and found["max"] == pytest.approx(0.2) and found["groups"] == 2
