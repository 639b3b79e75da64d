"""``density`` on the CPU: right answers, every table and picture."""

from __future__ import annotations

from djinn_fx.benchmarks import registry
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.tables import missing


def test_density_runs_small() -> None:
    entry = registry.find("density")
    record = registry.run(entry, Options(model="tiny", device="cpu", quick=True), lambda line: None)
    assert record.right and len(record.checks) == 6
    assert missing(record.results["others"]) is None
    agents, others = entry.tables(record)
    assert len(agents.rows) == 8 and all(len(row) == len(agents.columns) for row in agents.rows) and others.rows
    (picture,) = entry.pictures(record)
    assert set(picture.series) == {"tiers", "resident", "recompute", "per layer"}
