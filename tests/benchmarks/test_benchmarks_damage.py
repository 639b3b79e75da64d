"""Records and files that are damaged: named, with what to do, and without taking others with them."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from djinn_fx.benchmarks import compile as compiling
from djinn_fx.benchmarks import models, registry, report
from djinn_fx.benchmarks.answers import tolerance
from djinn_fx.benchmarks.context import Context, Options
from djinn_fx.benchmarks.peers import roster
from djinn_fx.benchmarks.record import Record, load, save
from djinn_fx.benchmarks.stats import rotated
from djinn_fx.cli import app
from djinn_fx.errors import InvalidValue


def record() -> Record:
    arm = {"median": 2.0, "unit": "ms"}
    options = {"model": "tiny", "dtype": "float32", "seed": 0}
    return Record("decode", "2026-01-01", options, {"device_name": "x"}, 1.0, [], {"ours": {"a": arm}})


def reported(*paths: Path, out: Path) -> tuple[int, str]:
    words = ["bench", "report", *map(str, paths), "--out", str(out)]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    return shown.exit_code, shown.output


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no results": lambda d: d.pop("results"),
    "no figures": lambda d: d.update(results={}),
    "a list of results": lambda d: d.update(results=[1]),
    "no options": lambda d: d.update(options={}),
    "no environment": lambda d: d.update(environment=None),
    "no versions": lambda d: d["environment"].update(versions=None),
    "a wordy length": lambda d: d.update(seconds="long"),
    "a short log": lambda d: d.update(log=[[1]]),
    "nan": lambda d: d["results"]["ours"]["a"].update(median=float("nan")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_record_is_named(name: str, tmp_path: Path) -> None:
    document = json.loads(save(record(), tmp_path / "a.json").read_text())
    DAMAGE[name](document)
    (tmp_path / "b.json").write_text(json.dumps(document))
    code, said = reported(tmp_path / "b.json", out=tmp_path)
    assert code == 2 and "b.json" in said


def test_a_figure_that_is_a_word_is_named_in_two_runs_as_well(tmp_path: Path) -> None:
    good, bad = save(record(), tmp_path / "a.json"), record()
    bad.results["ours"]["a"]["median"] = "fast"
    code, said = reported(good, save(bad, tmp_path / "b.json"), out=tmp_path)
    assert code == 2 and "b.json" in said and "run the benchmark again" in said


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(content)
    code, said = reported(tmp_path / "b.json", out=tmp_path)
    assert code == 2 and "b.json is not JSON" in said


def test_a_run_that_compared_nothing_does_not_call_its_answers_right() -> None:
    assert "Nothing was measured" in report.verdict(record())


def test_a_broken_benchmark_is_listed_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shut.py").write_text('"""Shut."""\n\nBENCHMARK = (\n')
    (tmp_path / "open.py").write_text('"""Open: first line.\n\nMore.\n"""\n\nBENCHMARK = nothing\n')
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    assert registry.summaries()["open"] == "Open: first line." and registry.summaries()["shut"].startswith("broken")

    def fails(name: str) -> ModuleType:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(ValueError, match=r"'open' cannot be imported.*mend benchmarks/open\.py"):
        registry.find("open")


def test_a_broken_peer_is_absent_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def fails(name: str, *rest: str) -> ModuleType:
        if name.endswith("with_nnsight"):
            raise ImportError("no such thing")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fails)
    tiny = models.load("tiny", torch.device("cpu"), torch.float32)
    found = {peer.name: peer for peer in roster.peers()}
    assert "no such thing" in str(roster.why_not(found["with_nnsight"], tiny, quick=False))
    hooks = found["PyTorch eager + forward hooks"]
    assert roster.why_not(hooks, tiny, quick=True) is None
    monkeypatch.setattr(type(hooks), "available", lambda self, loaded: loaded.gone)
    assert "AttributeError" in str(roster.why_not(hooks, tiny, quick=True))


def test_a_child_that_fails_gives_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Traceback (most recent call last):\n" + "  File, line\n" * 50 + "OSError: no such model\n"
    done = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)
    context = Context(Options(model="x/y", device="cpu", peers=False).resolved(), lambda line: None)
    (row,) = compiling.run(context)["rows"]
    assert row["cold"] == {"failed": "RuntimeError: OSError: no such model"}
    assert any(line == said.rstrip() for _, line in context.log)


def test_figures_that_are_not_finite_do_not_lose_the_run(tmp_path: Path) -> None:
    odd = record()
    odd.results["moved"] = [float("nan"), 1.0, (float("inf"),)]
    assert load(save(odd, tmp_path / "a.json")).results["moved"] == [None, 1.0, [None]]
    parts = registry.Parts(tmp_path / "a.parts.jsonl")
    parts.keep("odd", float("nan"))
    assert parts.path.read_text() == '{"part": "odd", "found": null}\n'


def test_a_model_that_gives_nan_is_refused_by_name() -> None:
    loaded = models.load("tiny", torch.device("cpu"), torch.float32)
    with torch.no_grad():
        next(iter(loaded.model.parameters())).fill_(torch.nan)
        with pytest.raises(InvalidValue, match=r"tiny in float32 .* not finite.*--dtype"):
            tolerance(loaded, loaded.prompts(1, 8, 0))


def test_no_arms_have_no_turns() -> None:
    assert rotated([], 3) == [] and rotated([1, 2], 3) == [2, 1]
