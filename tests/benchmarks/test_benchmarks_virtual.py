"""Budgets on a tiny model: streaming answers are the resident ones bit for bit, a wrong one has no speed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from djinn_fx.benchmarks import report, virtual
from djinn_fx.benchmarks.answers import Answer
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.ours import OurDecoder
from djinn_fx.benchmarks.record import Record
from djinn_fx.benchmarks.registry import find, run

QUICK = Options(model="tiny", device="cpu", quick=True)


@cache
def record() -> Record:
    return run(find("virtual"), QUICK, lambda line: None)


def test_every_budget_is_right_and_timed() -> None:
    found = record()
    assert found.right, [check for check in found.checks if not check.held]
    assert len(found.results["budgets"]) == len(virtual.SHARES)
    streamed = []
    for budget, cells in found.results["budgets"].items():
        ours = cells["ours"]
        assert ours["weights"] <= int(budget)
        assert ours["prompt"]["median"] > 0 and ours["decode"]["median"] > 0
        assert ours["decode"]["bus_share"] == pytest.approx(ours["floor_ms"] / ours["decode"]["median"])
        assert "no" in str(cells["accelerate"]) or "absent" in cells["accelerate"]
        streamed.append(ours["streamed"])
    assert streamed[0] > streamed[1] > 0


def test_the_report_shows_the_floor_and_what_is_missing(tmp_path: Path) -> None:
    text = report.write(record(), tmp_path).read_text()
    assert "floor: the bus" in text and "resident" in text and "unsupported" in text


def test_other_bits_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = OurDecoder.answer

    def off(self: OurDecoder, *args: object) -> Answer:
        found = answer(self, *args)  # type: ignore[arg-type]
        assert found.logits is not None
        streams = self.dj.memory()["weights_streamed"] > 0
        return Answer(found.tokens, torch.nextafter(found.logits, torch.tensor(9.0)) if streams else found.logits)

    monkeypatch.setattr(OurDecoder, "answer", off)
    found = run(find("virtual"), QUICK, lambda line: None)
    assert not found.right
    for cells in found.results["budgets"].values():
        assert "refused" in cells["ours"]["prompt"] and "refused" in cells["ours"]["decode"]
