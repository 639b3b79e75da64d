"""Registry, records, checks and reports, without running a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from djinn_fx.benchmarks import compile as compiling
from djinn_fx.benchmarks import report
from djinn_fx.benchmarks.answers import Answer, judge
from djinn_fx.benchmarks.context import Context, Options
from djinn_fx.benchmarks.interacting.residency import bus_bytes
from djinn_fx.benchmarks.record import Record, load, save
from djinn_fx.benchmarks.registry import Benchmark, Parts, discover, run, summaries
from djinn_fx.benchmarks.tables import Picture, Table, figure
from djinn_fx.benchmarks.waiting import waiting_calls
from djinn_fx.cli import app

ALL = {"interactivity", "decode", "checkpoint", "compile", "steps", "endurance", "virtual"}


def context() -> Context:
    return Context(Options(model="tiny", device="cpu", quick=True).resolved(), listener=lambda line: None)


def answer(*tokens: int, vocab: int = 5) -> Answer:
    row = torch.tensor(tokens)[None]
    return Answer(row, torch.zeros(1, len(tokens), vocab).scatter_(-1, row[..., None], 4.0))


def test_all_are_registered_under_their_files_names() -> None:
    found = discover()
    assert set(found) >= ALL and set(found) == set(summaries())
    assert all(name == entry.name for name, entry in found.items())


def test_the_command_line_lists_them() -> None:
    shown = CliRunner().invoke(app, ["bench"])
    assert shown.exit_code == 0
    assert all(name in shown.output for name in ALL)


def test_a_wrong_result_has_no_speed() -> None:
    here = context()
    timed: list[int] = []

    def take() -> list[float]:
        timed.append(1)
        return [1.0]

    wrong = here.speed(here.check("the answer", False, "off by 3"), take)
    assert wrong == {"refused": "wrong result: off by 3"} and not timed
    assert figure(wrong) == "refused: wrong result: off by 3"
    assert here.speed(here.check("the answer", True), take)["median"] == 1.0


def test_a_part_that_fails_is_seen_and_the_others_go_on() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no memory")

    def measure(here: Context) -> dict[str, Any]:
        return {"a": here.part("a", broken), "b": here.part("b", lambda: {"median": 2.0, "unit": "ms"})}

    entry = Benchmark("fake", measure, lambda record: [], lambda record: [])
    record = run(entry, Options(model="tiny", device="cpu"), lambda line: None)
    assert record.results == {"a": {"failed": "RuntimeError: no memory"}, "b": {"median": 2.0, "unit": "ms"}}
    assert not record.right and any("Traceback" in line for _, line in record.log)


def test_what_is_done_is_kept_even_if_the_run_dies(tmp_path: Path) -> None:
    def measure(here: Context) -> dict[str, Any]:
        here.part("figures", lambda: {"median": 2.0})
        here.part("objects", lambda: {"for the next part": object()})
        raise KeyboardInterrupt

    parts = Parts(tmp_path / "new" / "fake.parts.jsonl")
    entry = Benchmark("fake", measure, lambda record: [], lambda record: [])
    with pytest.raises(KeyboardInterrupt):
        run(entry, Options(model="tiny", device="cpu"), lambda line: None, parts.keep)
    assert parts.path.read_text() == '{"part": "figures", "found": {"median": 2.0}}\n'
    parts.clear()
    assert not parts.path.exists()


def test_a_spent_budget_leaves_parts_out_visibly() -> None:
    here = Context(Options(model="tiny", device="cpu", budget_seconds=0.0).resolved(), listener=lambda line: None)
    assert "budget" in here.part("late", lambda: 1)["skipped"]


def test_answers_are_judged() -> None:
    right = answer(1, 2, 3)
    assert judge(right, right, 0.01).held
    other = judge(right, answer(1, 4, 3), 0.01)
    assert not other.held and "wrong from step 1" in other.detail
    assert "row 0" in judge(right, Answer(answer(1, 4, 3).tokens, None), 0.01).detail
    assert not judge(right, answer(1, 2), 0.01).held
    assert not judge(right, Answer(right.tokens, torch.full_like(right.logits, torch.nan)), 0.01).held  # type: ignore[arg-type]
    assert judge(right, Answer(right.tokens, None), 0.01).held


def test_an_edit_that_was_ignored_is_called_so() -> None:
    found = judge(answer(1, 2), answer(3, 2), 0.01, ignored=answer(3, 2))
    assert not found.held and "silently ignored" in found.detail


def test_records_survive_a_file_and_others_are_refused(tmp_path: Path) -> None:
    record = _record(1.0)
    assert load(save(record, tmp_path / "a.json")) == record
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["format"] == "djinn-bench/1"
    for broken in ("{", "[]", '{"format": "djinn-bench/0"}', '{"format": "djinn-bench/1"}'):
        (tmp_path / "b.json").write_text(broken)
        with pytest.raises(ValueError, match=r"b\.json"):
            load(tmp_path / "b.json")


def _record(median: float, **more: Any) -> Record:
    cell = {"median": median, "unit": "ms"}
    results = {"ours": [{"layer": 3, "whole": cell}, {"layer": 6, "whole": {"refused": "wrong result"}}], **more}
    return Record("decode", "2026-01-01", {"model": "tiny", "dtype": "float32"}, {"device_name": "x"}, 1.0, [], results)


def test_two_records_side_by_side(tmp_path: Path) -> None:
    paths = [save(_record(2.0), tmp_path / "a.json"), save(_record(3.0, extra={"absent": "gone"}), tmp_path / "b.json")]
    shown = CliRunner().invoke(app, ["bench", "report", *map(str, paths)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    text = (tmp_path / "decode_side_by_side.md").read_text()
    assert "| ours / layer 3 / whole | ms | 2 | 3 | 1.500 |" in text
    assert "| ours / layer 6 / whole |  | refused: wrong result | refused: wrong result | - |" in text
    assert "| extra |  | - | absent: gone | - |" in text


def test_two_benchmarks_are_not_put_side_by_side(tmp_path: Path) -> None:
    other = _record(1.0)
    other.benchmark = "compile"
    paths = [save(_record(2.0), tmp_path / "a.json"), save(other, tmp_path / "b.json")]
    assert CliRunner().invoke(app, ["bench", "report", *map(str, paths)]).exit_code == 2


def test_pictures_are_drawn(tmp_path: Path) -> None:
    from djinn_fx.benchmarks.plots import draw

    lines = Picture(
        "lines", "Lines", "lines", {"a": [(1, 2.0), (4, 3.0)], "b": [(1, 4.0), (4, 2.0)]}, "MiB", "ms", "xy"
    )
    bars = Picture("bars", "Bars", "bars", {"us": [("plain", 1.0)], "them": [("x", 9.0)]}, "ms", floor={"floor": 0.5})
    ranged = Picture("ranged", "Bars", "bars", {"us": [("plain", -1.0)]}, "%", spans={"plain": (-9.0, 7.0)})
    for picture in (lines, bars, ranged):
        assert draw(picture, tmp_path).read_bytes().startswith(b"\x89PNG")


def test_tables_in_markdown_hold_their_cells() -> None:
    text = report.markdown(Table("T", ["a", "b"], [["x|y", "two\nlines"]], "A note."))
    assert text.splitlines() == ["### T", "", "| a | b |", "| --- | --- |", "| x\\|y | two lines |", "", "A note."]


def test_bytes_on_the_bus_are_counted_from_a_trace(tmp_path: Path) -> None:
    events = [
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "args": {"bytes": 8}},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "args": {"bytes": 32}},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "args": {"bytes": 999}},
        {"cat": "kernel", "name": "gemm"},
        {"ph": "M"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert bus_bytes(tmp_path / "trace.json") == {"HtoD": 32, "DtoH": 8, "copies": 2}


def test_calls_that_wait_are_counted_from_a_trace(tmp_path: Path) -> None:
    events = [
        {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "dur": 400.0},
        {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "dur": 1.5},
        {"cat": "cuda_driver", "name": "cuStreamSynchronize", "dur": 30},
        {"cat": "cuda_runtime", "name": "cudaMemcpy", "dur": 12.0},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync", "dur": 900.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "dur": 90.0},
        {"cat": "cpu_op", "name": "cudaDeviceSynchronize"},
        {"ph": "M"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    found = waiting_calls(tmp_path / "trace.json")
    assert found == {"cudaEventSynchronize": 2, "cuStreamSynchronize": 1, "cudaMemcpy": 1, "waited": 3}


def test_depths_are_asked_for() -> None:
    def depths(text: str, **options: Any) -> list[int]:
        return compiling.depths_of(Context(Options(device="cpu", depths=text, **options).resolved()))

    assert depths("32") == [32] and depths("4, 32") == [4, 32]
    assert depths("", quick=True) == [4] and set(depths("")) == {4, 8, 16}
    for broken in ("x", "4,", "0", "-4"):
        with pytest.raises(ValueError, match="--depths"):
            depths(broken)


def test_without_peers_the_whole_graph_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_pair", lambda context, depth, kind: {"cold": {}, "warm": {}})
    ours = compiling.run(Context(Options(device="cpu", depths="32", peers=False).resolved(), lambda line: None))
    both = compiling.run(Context(Options(device="cpu", depths="32").resolved(), lambda line: None))
    assert [(row["kind"], row["depth"]) for row in ours["rows"]] == [("djinn", 32)]
    assert {row["kind"] for row in both["rows"]} == {"djinn", "whole"} and set(ours["names"]) == {"djinn"}


def test_what_vllm_lacks_is_read_off_its_api(monkeypatch: pytest.MonkeyPatch) -> None:
    from djinn_fx.benchmarks.peers.with_vllm import lacking, pausing

    async def whole(self: object, *, mode: str = "abort") -> None: ...

    async def single(self: object, request_id: str) -> None: ...

    fake, inner = ModuleType("vllm"), ModuleType("vllm.v1.engine.async_llm")
    for name, module in {"vllm": fake, "vllm.v1": ModuleType("v1"), "vllm.v1.engine": ModuleType("e")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.async_llm", inner)
    fake.SamplingParams = type("P", (), {"__struct_fields__": ("n", "max_tokens", "_eos")})  # type: ignore[attr-defined]
    assert "none of the 2 fields" in lacking()
    fake.SamplingParams = type("P", (), {"__struct_fields__": ("n", "steering")})  # type: ignore[attr-defined]
    assert "has steering" in lacking()
    inner.AsyncLLM = type("A", (), {"pause_generation": whole})  # type: ignore[attr-defined]
    assert "pause_generation(mode) pauses the whole engine" in pausing()
    inner.AsyncLLM = type("A", (), {"pause_generation": single})  # type: ignore[attr-defined]
    assert "between steps" in pausing()
