"""Wrong answers of our own: they have no speed in results, tables, pictures and the README."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from djinn_fx.benchmarks import readme_tables, report
from djinn_fx.benchmarks.answers import Answer
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.interacting import scaling
from djinn_fx.benchmarks.ours import OurDecoder
from djinn_fx.benchmarks.record import Check, Record, save
from djinn_fx.benchmarks.registry import find, run

QUICK = Options(model="tiny", device="cpu", quick=True, peers=False)


def speeds(tree: Any, path: str = "") -> Iterator[str]:
    """Where in a tree of results a time stands."""
    if isinstance(tree, dict):
        if "median" in tree:
            yield path
        for key, value in tree.items():
            if key.endswith("_ms") and isinstance(value, float):
                yield f"{path}/{key}"
            yield from speeds(value, f"{path}/{key}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from speeds(value, f"{path}/{index}")


def unequal(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """No two tensors have the same bits, for some modules."""
    for name in modules:
        module = importlib.import_module(f"djinn_fx.benchmarks.{name}")
        monkeypatch.setattr(module, "same_bits", lambda a, b: False)


def test_equal_to_a_wrong_answer_has_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(self: OurDecoder, *args: Any) -> Answer:
        right = plain(self, *args)
        assert right.logits is not None
        return Answer(right.tokens, torch.full_like(right.logits, torch.nan))

    plain = OurDecoder.answer
    monkeypatch.setattr(OurDecoder, "answer", wrong)
    found = run(find("decode"), QUICK, lambda line: None)
    assert not found.right and list(speeds(found.results["ours"])) == []
    assert "stopped every token at one layer, untouched | refused" in report.write(found, tmp_path).read_text()
    (picture,) = find("decode").pictures(found)
    assert not picture.series["djinn_fx"]


def test_stops_and_checkpoints_that_are_not_exact_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ("scaling", "stopping", "steering", "overhead", "concurrency")
    unequal(monkeypatch, "forking", *(f"interacting.{name}" for name in modules))
    found = run(find("interactivity"), QUICK, lambda line: None)
    parts = {name: part for name, part in found.results.items() if name not in ("setting", "comparison")}
    assert not found.right and list(speeds(parts)) == []
    assert hasattr(scaling, "goes_on")
    assert {picture.name for picture in find("interactivity").pictures(found)} == {"checkpoint_bytes"}
    assert all(row[1].startswith("refused") for t in find("interactivity").tables(found)
               if t.title == "Call to the stop, by layer" for row in t.rows)  # fmt: skip


def test_checkpoints_of_sessions_that_do_not_go_on_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    unequal(monkeypatch, "forking")
    found = run(find("checkpoint"), QUICK, lambda line: None)
    parts = [found.results[name] for name in ("sessions", "at_stop", "activation")]
    assert not found.right and list(speeds(parts)) == []
    assert find("checkpoint").tables(found)


def test_the_readme_says_if_any_of_its_records_is_wrong(tmp_path: Path) -> None:
    first = run(find("decode"), QUICK, lambda line: None)
    second = replace(first, started="2001-02-03T04:05:06", options={**first.options, "model": "other"})
    page = "<!-- bench:decode -->\n<!-- /bench -->\n"

    def filled(*records: Record) -> str:
        for name, record in zip(("gpt2", "other"), records, strict=True):
            save(record, tmp_path / readme_tables.RESULTS / "h100" / f"decode_{name}.json")
        return readme_tables.filled(page, tmp_path)

    text = filled(first, second)
    assert "every answer checked and right" in text and f"{first.started[:10]} and 2001-02-03" in text
    assert "**not** right" in filled(first, replace(second, checks=[Check("it", False)]))
