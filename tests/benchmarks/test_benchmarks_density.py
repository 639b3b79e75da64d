"""``density`` on the CPU: arrivals that no server slows down, right answers, every table and picture."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from djinn_fx.benchmarks import density, registry, report
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.crowd import GRACE, MISJUDGED, SPREAD, Crowd, Visit, timetable
from djinn_fx.benchmarks.moving import Mover
from djinn_fx.benchmarks.record import Record
from djinn_fx.benchmarks.serving import Ours
from djinn_fx.benchmarks.tables import missing

QUICK = Options(model="tiny", device="cpu", quick=True)


@cache
def record() -> Record:
    return registry.run(registry.find("density"), QUICK, lambda line: None)


@dataclass
class Clock:
    """Time that goes on only where somebody waits or works."""

    at: float = 0.0

    def now(self) -> float:
        return self.at

    def pass_by(self, seconds: float) -> None:
        self.at += seconds


def crowd_of(agents: int, clock: Clock, *, think: float = 1.0, window: float = 4.0, new: int = 2) -> Crowd:
    return Crowd(timetable(agents, think, window, 100, 0), new, window, clock.now, clock.pass_by)


def serve_alone(crowd: Crowd, clock: Clock, seconds: float) -> None:
    """A server that takes one turn at a time, and so many seconds for each token."""
    crowd.open()
    while not crowd.over:
        for visit in crowd.arrived(1):
            for token in range(crowd.new):
                clock.pass_by(seconds)
                crowd.hear(visit, token)
            crowd.done(visit)
            break
        else:
            crowd.wait()


def test_the_timetable_is_seeded_and_as_asked() -> None:
    turns = timetable(7, 2.0, 9.0, 3, 5)
    assert turns == timetable(7, 2.0, 9.0, 3, 5) != timetable(7, 2.0, 9.0, 3, 6)
    assert [turn.at for turn in turns] == sorted(turn.at for turn in turns) and turns[-1].at < 9.0
    assert timetable(3, 2.0, 9.0, 3, 5) == [turn for turn in turns if turn.agent < 3]  # agents are independent
    for agent in range(7):
        mine = [turn for turn in turns if turn.agent == agent]
        assert 0 < len(mine) <= 3
        for before, after in pairwise(mine):
            away = after.at - before.at
            assert 2.0 * (1 - SPREAD) <= away <= 2.0 * (1 + SPREAD)
            assert abs(after.announced - after.at) <= away * MISJUDGED + 1e-9


def test_waits_count_from_the_arrival() -> None:
    clock = Clock(17.0)
    crowd = crowd_of(3, clock)
    serve_alone(crowd, clock, 0.2)
    firsts, wholes = crowd.waits()
    assert crowd.unserved == 0 and len(firsts) == len(crowd.turns)
    assert min(firsts) == pytest.approx(0.2) and max(firsts) > 0.3  # some found the server at another's turn
    assert all(whole == pytest.approx(first + 0.2) for first, whole in zip(firsts, wholes, strict=True))
    assert 0.5 < crowd.busy_share < 1


def test_an_overloaded_server_breaks_down_and_its_waits_do_not_vanish() -> None:
    clock = Clock()
    crowd = crowd_of(6, clock)
    serve_alone(crowd, clock, 0.4)
    firsts, wholes = crowd.waits()
    assert crowd.unserved > 0 and crowd.busy_share > 0.9
    assert len(firsts) == len(wholes) == len(crowd.turns)
    assert max(firsts) > 1.0 and crowd.elapsed <= crowd.window * (1 + GRACE) + 0.8


def test_an_agent_is_served_one_turn_at_a_time() -> None:
    clock = Clock()
    crowd = crowd_of(1, clock)
    crowd.open()
    clock.pass_by(crowd.window)
    (first,) = crowd.arrived(9)
    assert crowd.arrived(9) == []
    crowd.done(first)
    (second,) = crowd.arrived(9)
    assert second.turn.at > first.turn.at
    absence = crowd.absence(0)
    assert absence is not None and absence >= 0


def test_every_way_is_right_and_shown(tmp_path: Path) -> None:
    found = record()
    assert found.right, [check for check in found.checks if not check.held]
    few, many = (str(count) for count in found.results["sizes"]["counts"])
    for name, way in density.WAYS.items():
        cells = found.results["ways"][name]
        assert list(cells) == ([few, many] if way.everywhere else [many])
        if name == "offloaded cache":
            assert all("CUDA" in str(missing(cell)) for cell in cells.values())
        else:
            assert 0 < cells[many]["first_ms"]["p50"] <= cells[many]["turn_ms"]["p50"]
    assert found.results["ways"]["tiers"][many]["host_bytes"] > 0
    assert found.results["ways"]["resident"][many]["host_bytes"] == 0
    assert [entry["asked"] for entry in found.results["targets"]] == [2.0, 5.0]
    text = report.write(found, tmp_path).read_text()
    assert "everything resident" in text and "step time" in text and (tmp_path / "density_tiny_density.png").exists()


def test_moves_beside_a_decode_are_counted() -> None:
    rates = record().results["others"]["rates"]
    assert set(rates) == {"as the agents move", "as hard as the bus allows"}
    for found in rates.values():
        assert found["moves"] >= 2 and found["moved_bytes_per_second"] > 0
        assert len(found["samples"]["alone"]) == len(found["samples"]["moving"]) == found["rounds"]


def test_what_fails_on_the_moving_thread_fails_the_measurement() -> None:
    class Broken:
        def offload(self) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), Mover([Broken()], 8, 1e9).alive() as mover:
        for _ in range(1000):
            mover.let(True)
            time.sleep(0.01)


def test_wrong_tokens_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ours.hear

    def off(self: Ours, crowd: Crowd, visit: Visit, token: int) -> None:
        right(self, crowd, visit, token - 1 if token > 50 else token + 1)

    monkeypatch.setattr(Ours, "hear", off)
    monkeypatch.setattr(density, "WAYS", {"tiers": density.WAYS["tiers"]})
    found = registry.run(registry.find("density"), QUICK, lambda line: None)
    assert not found.right
    assert all("refused" in cell for cell in found.results["ways"]["tiers"].values())


def test_who_cannot_keep_up_is_not_tried() -> None:
    def why(name: str, count: int, others: dict[str, object]) -> object:
        class Stub:
            seats = 8
            openings = dict.fromkeys(range(100))

            class loaded:
                device = torch.device("cpu")

            class context:
                options = QUICK

        return density.Cell(Stub(), name, count, 0.0, others)._why_not(density.WAYS[name])  # type: ignore[arg-type]

    assert why("resident", 8, {}) is None and "8 rows" in why("resident", 9, {})["broke"]  # type: ignore[index]
    assert "broke at 4" in why("tiers", 8, {"4": {"broke": "so", "busy": 1.0}})["broke"]  # type: ignore[index]
    assert why("per layer", 8, {"4": {"busy": 0.9}}) is None
    assert "3.6" in why("per layer", 16, {"4": {"busy": 0.9}})["broke"]  # type: ignore[index]
    assert why("recompute", 16, {"4": {"busy": 0.9}}) is None
