"""Budgets on a tiny model: streaming answers are the resident ones bit for bit, a wrong one has no speed."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from djinn_fx.benchmarks import models, report, virtual, virtual_report
from djinn_fx.benchmarks.answers import Answer
from djinn_fx.benchmarks.context import Context, Options
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
    budgets = {"1000": {name: {part: {"median": ms} for part in ("prompt", "decode")} | {"weights": 1}
                        for name, ms in (("ours", 2.0), ("accelerate", 118.0))}}  # fmt: skip
    (row,) = virtual_report._ratios(budgets).rows
    assert row[1:] == ["59 x", "59 x", ""]


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


def test_accelerate_is_told_what_transformers_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not installed here: a stand-in takes what its documentation names, and nothing else."""
    told: dict[str, Any] = {}
    library: Any = ModuleType("accelerate")

    def infer_auto_device_map(
        model: object, max_memory: dict[int | str, int], no_split_module_classes: list[str]
    ) -> dict[str, int | str]:
        told.update(max_memory=max_memory, whole=no_split_module_classes)
        return {"transformer": 0, "lm_head": "cpu"}

    def dispatch_model(
        model: object, device_map: dict[str, int | str], main_device: int, skip_keys: list[str]
    ) -> object:
        told.update(map=device_map, main=main_device, skipped=skip_keys)
        return model

    library.infer_auto_device_map, library.dispatch_model = infer_auto_device_map, dispatch_model
    monkeypatch.setitem(sys.modules, "accelerate", library)
    virtual.dispatch(models.load("tiny", torch.device("cpu"), torch.float32).model, 1 << 20, 0)
    assert told["max_memory"][0] == 1 << 20 and told["max_memory"]["cpu"] > 1 << 40
    assert told["whole"] == ["GPT2Block"] and isinstance(told["skipped"], list)
    assert told["map"] == {"transformer": 0, "lm_head": "cpu"} and told["main"] == 0


@pytest.mark.parametrize(
    ("device", "peers", "installed", "first", "why"),
    [
        ("cuda", False, True, True, "skipped"),
        ("cpu", True, True, True, "unsupported"),
        ("cuda", True, False, True, "absent"),
        ("cuda", True, True, False, "skipped"),
        ("cuda", True, True, True, "measured"),
    ],
)
def test_what_keeps_accelerate_away_is_said(
    monkeypatch: pytest.MonkeyPatch, device: str, peers: bool, installed: bool, first: bool, why: str
) -> None:
    here = object.__new__(virtual.Virtual)
    here.context = Context(Options(model="tiny", device="cpu", peers=peers), listener=lambda line: None)
    monkeypatch.setattr(Context, "device", torch.device(device))
    monkeypatch.setattr(virtual, "version_of", lambda name: "1.14" if installed else None)
    monkeypatch.setattr(virtual.Virtual, "_accelerate", lambda self, budget: {"measured": budget})
    monkeypatch.setattr("djinn_fx.benchmarks.clock.clear", lambda device: None)
    assert list(here.theirs(7, first=first)) == [why]
