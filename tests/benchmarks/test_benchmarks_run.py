"""The benchmarks themselves, on a tiny model: everything measured, every peer seen, every answer right."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from djinn_fx.benchmarks import models, readme_tables, report
from djinn_fx.benchmarks.answers import Answer, Work, tolerance
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.copying import Copying, ways
from djinn_fx.benchmarks.decode import _counts
from djinn_fx.benchmarks.peers.hooks import HooksDecoder
from djinn_fx.benchmarks.peers.roster import peers
from djinn_fx.benchmarks.record import Record, load, save
from djinn_fx.benchmarks.registry import find, run
from djinn_fx.benchmarks.tables import missing
from djinn_fx.benchmarks.truth import Truth

CPU = torch.device("cpu")


@cache
def tiny() -> models.Loaded:
    return models.load("tiny", CPU, torch.float32)


@cache
def record(name: str) -> Record:
    real = importlib.util.find_spec
    gone = ("nnsight", "transformer_lens", "vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else real(name, *rest))
        return run(find(name), Options(model="tiny", device="cpu", quick=True), lambda line: None)


def test_interactivity_is_exact_and_whole(tmp_path: Path) -> None:
    found = record("interactivity")
    assert found.right, [check for check in found.checks if not check.held]
    results = found.results
    assert not [name for name, part in results.items() if "failed" in part or "skipped" in part]
    assert results["breakpoints"]["token_accuracy"] == 1.0 and results["breakpoints"]["bitwise"]
    assert len(results["breakpoints"]["trials"]) == 3 * len(results["setting"]["layers"])
    assert len(results["breakpoints"]["every_layer"]) == 4
    assert results["concurrency"]["exact"] and results["steering"]["hooks"]["right"]
    assert "no bus" in results["residency"]["absent"]
    text = report.write(found, tmp_path).read_text()
    assert "every answer was right" in text.lower() and "Breakpoints, trial by trial" in text
    for name in ("djinn_breakpoint_results.json", "comparative_results.json"):
        assert json.loads((tmp_path / name).read_text())["setting"] == results["setting"]
    assert (tmp_path / "interactivity_tiny.log").stat().st_size > 0


def test_records_hold_what_a_reader_needs(tmp_path: Path) -> None:
    found = load(save(record("decode"), tmp_path / "a.json"))
    assert found.options["seed"] == 0 and found.environment["versions"]["torch"] == torch.__version__
    for variant in found.results["ours"]["1"].values():
        assert variant["count"] == len(variant["samples"]) >= 2 and variant["p95"] >= variant["median"] > 0


def test_absent_peers_are_visible_rows(tmp_path: Path) -> None:
    found = record("decode")
    absent = {name: missing(entry) for name, entry in found.results["peers"].items() if missing(entry)}
    assert set(found.results["peers"]) == {peer.name for peer in peers()}
    assert {"nnsight", "vLLM", "TransformerLens (TransformerBridge)"} <= set(absent)
    text = report.write(found, tmp_path).read_text()
    assert all(name in text and str(why) in text for name, why in absent.items())


def test_peers_that_compile_are_measured_less_often() -> None:
    compiling = next(peer for peer in peers() if peer.compiles)
    counts = {large: _counts(compiling, "plain", (1, 8, 32), large=large) for large in (False, True)}
    assert counts == {False: (1, 32), True: (1,)}
    others = [peer for peer in peers() if not peer.compiles and not peer.last]
    assert all(_counts(peer, "scale", (1, 8, 32), large=True) == (1, 8, 32) for peer in others)
    assert peers().index(compiling) > max(peers().index(peer) for peer in others)


def test_decoding_is_right_and_the_floor_is_lower() -> None:
    found = record("decode")
    assert found.right and len(found.checks) >= 9
    assert 0 < found.results["floor_ms"] < found.results["ours"]["1"]["plain"]["median"]


def test_a_wrong_system_is_refused_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: HooksDecoder, *args: Any) -> Answer:
        right = plain(self, *args)
        assert right.logits is not None
        return Answer(right.tokens, right.logits.flip(-1)) if seen else right

    plain, seen = HooksDecoder.answer, list[int]()
    monkeypatch.setattr(HooksDecoder, "answer", wrong)
    prompts = tiny().prompts(1, 8, 0)
    with torch.no_grad():
        truth = Truth(tiny(), prompts, {"plain": Work("plain")}, tolerance(tiny(), prompts))
        truth.answer("plain")
        seen.append(1)
        verdict = truth.judge("plain", HooksDecoder(tiny()).answer(prompts, Work("plain"), 6))
    assert not verdict.held


def test_every_way_of_copying_brings_every_byte() -> None:
    tensors = [torch.randn(2, 11, 3)[:, :7] for _ in range(3)] + [torch.randn(5).to(torch.float16)]
    copying = Copying.of(tensors)
    seen = 0
    for way in ways(copying):
        if way.absent is None:
            copying.spoil()
            assert not way.arrived()
            way.copy()
            assert way.arrived(), way.name
            seen += 1
    assert seen == 4


def test_a_row_is_sent_as_checkpoints_send_it() -> None:
    copying = Copying.like(tiny(), 1 << 16)
    assert copying.row is not None
    assert sum(tensor.nbytes for tensor in copying.tensors) == copying.nbytes <= 1 << 16
    ours = {way.name: way for way in ways(copying)}["a row as checkpoints send it (ours)"]
    assert ours.absent is None and ours.arrived()
    copying.spoil()
    assert not ours.arrived()
    own: list[float] = []
    copying.begin(ours, own)
    assert ours.arrived() and len(own) == 1
    copying.row.arena.layers[0][0][0, 0, 0] += 1
    assert not ours.arrived()


def test_checkpoints_and_forks_are_exact(tmp_path: Path) -> None:
    found = record("checkpoint")
    assert found.right, [check for check in found.checks if not check.held]
    results = found.results
    assert not [name for name, part in results.items() if isinstance(part, dict) and missing(part)]
    assert [row["tokens"] for row in results["forks"]] == [16, 32]
    assert all(row["whole"]["median"] >= row["dispatch"]["median"] > 0 for row in results["forks"])
    assert results["activation"]["bytes"] == 2_500_000
    text = report.write(found, tmp_path).read_text()
    assert "fork of 32 tokens" in text and "share of the copy's bandwidth" in text and "Checkpoint at a stop" in text


def test_random_models_are_seeded_and_of_any_depth() -> None:
    same, deeper = models.load("tiny", CPU, torch.float32), models.load("tiny", CPU, torch.float32, layers=6)
    other = models.load("tiny", CPU, torch.float32, seed=1)
    weights = [next(m.model.parameters()) for m in (tiny(), same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert (tiny().layers, deeper.layers) == (4, 6)
    assert 0 < tiny().read_bytes < tiny().weight_bytes
    with pytest.raises(ValueError, match="weights of its own"):
        models.load("storyteller", CPU, torch.float32, layers=2)


def test_the_readme_is_filled_from_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records"):
        readme_tables.results_of(tmp_path)
    results = tmp_path / readme_tables.RESULTS / "h100"
    save(record("interactivity"), results / "interactivity_gpt2.json")
    save(record("decode"), results / "decode_gpt2.json")
    page = "".join(f"<!-- bench:{name} -->\ntyped\n<!-- /bench -->\n" for name in ("interactivity", "decode"))
    once = readme_tables.filled(page, tmp_path)
    assert "typed" not in once and "| token accuracy | 100 % | 100 % |" in once and "bandwidth floor" in once
    assert readme_tables.filled(once, tmp_path) == once == readme_tables.filled(page, tmp_path, "h100")
    with pytest.raises(ValueError, match="h200"):
        readme_tables.filled(page, tmp_path, "h200")
    with pytest.raises(ValueError, match="there are"):
        readme_tables.filled("<!-- bench:unknown -->\n<!-- /bench -->", tmp_path)
