"""Endurance on a tiny model, and that a leak is seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from djinn_fx.benchmarks import endurance, report
from djinn_fx.benchmarks.context import Context, Options
from djinn_fx.benchmarks.endurance_report import tables
from djinn_fx.benchmarks.record import Record
from djinn_fx.benchmarks.registry import find, run

QUICK = Options(model="tiny", device="cpu", quick=True)


@cache
def record() -> Record:
    return run(find("endurance"), QUICK, lambda line: None)


class Levels:
    """Stands for the benchmark's setting: levels that grow as they are told to."""

    def __init__(self, grows: int, budget: float | None = None) -> None:
        self.context = Context(Options(device="cpu", budget_seconds=budget).resolved(), lambda line: None)
        self.grows, self.done = grows, 0

    def levels(self) -> dict[str, int]:
        return {"rss": 1000 + self.grows * self.done}

    def live(self, index: int) -> int:
        self.done += 1
        return 1


def watched(bench: Any, asked: int = 100) -> dict[str, Any]:
    return endurance._watched(bench, "acts", asked, bench.live)


def test_cycles_and_lifetimes_leave_memory_where_it_was(tmp_path: Path) -> None:
    found = record()
    assert found.right, [check for check in found.checks if not check.held]
    for part, asked in (("cycles", 80), ("lifetimes", 20)):
        entry = found.results[part]
        assert entry["done"] >= asked and 0 < entry["settled_at"] < entry["done"] and "cut" not in entry
        assert entry["grew"].keys() == entry["before"].keys() >= {"rss", "pinned_used", "pinned_capacity"}
    assert found.results["memory"]["beyond_bytes"] is None  # there is no device
    assert found.results["memory"]["components"]["weights"] > 0
    assert "no device to wait for" in found.results["waits"]["absent"]
    assert "pause, checkpoint, resume" in report.write(found, tmp_path).read_text()


def test_a_leak_after_the_first_tenth_is_seen() -> None:
    still, leaking = Levels(0), Levels(endurance.ALLOWED["rss"] // 50)
    assert watched(still)["grew"] == {"rss": 0} and still.context.checks[-1].held
    assert watched(leaking)["grew"]["rss"] > endurance.ALLOWED["rss"]
    assert not leaking.context.checks[-1].held and "rss by" in leaking.context.checks[-1].detail


def test_a_spent_budget_says_how_many_were_done() -> None:
    bench = Levels(0, budget=0.0)
    found = watched(bench)
    assert found["done"] == 0 and found["grew"] is None and "after 0 of 100" in found["cut"]
    assert not bench.context.checks  # nothing was found, so nothing is claimed


def test_memory_beyond_and_waits_are_shown() -> None:
    memory = {
        "components": {"weights": 5 << 20},
        "beyond_bytes": 7 << 20,
        "beyond_trimmed_bytes": 6 << 20,
        "asked_bytes": endurance.LIMIT,
        "held": True,
    }
    rows = [
        {"act": "nothing", "per_step": {"cudaEventSynchronize": 1.0, "waited": 1.0}, "calls": 1.0, "waited": 1.0},
        {"act": "predicates", "per_step": {"cudaEventSynchronize": 3.0, "waited": 1.0}, "calls": 3.0, "waited": 1.0},
    ]
    for row in rows:
        row |= {"added": row["calls"] - 1.0, "added_waits": 0.0}  # type: ignore[operator]
    waits = {"rows": rows, "steps": 32, "asked": 0, "waited_us": 10.0}
    found = Record("endurance", "", {}, {}, results={**record().results, "memory": memory, "waits": waits})
    shown = {table.title: table for table in tables(found)}
    assert ["**beyond weights and KV arena**", "7 MiB"] in [
        list(row) for row in shown["Memory beyond weights and KV"].rows
    ]
    assert list(shown["Waiting for the device"].rows[1]) == ["predicates", "3", "1", "2", "0", "cudaEventSynchronize 3"]
