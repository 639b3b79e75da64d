"""Graph against graph on a tiny model: the whole graph is the same, a wrong one has no speed, lanes are put back."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import models, report
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.record import Record
from djinn_fx.benchmarks.registry import find, run
from djinn_fx.benchmarks.replays import Replays, loop_of, whole_program
from djinn_fx.program import LENGTHS

QUICK = Options(model="tiny", device="cpu", quick=True)
CPU = torch.device("cpu")


@cache
def record() -> Record:
    return run(find("steps"), QUICK, lambda line: None)


@cache
def compiled() -> djinn.Dj:
    model = models.load("tiny", CPU, torch.float32).model
    return djinn.compile(model, max_sessions=2, max_length=32, edit_rank=2, verify=False)


def test_every_graph_is_right_and_timed() -> None:
    found = record()
    assert found.right, [check for check in found.checks if not check.held]
    assert set(found.results["rows"]) == {"1", "2"}
    for entry in found.results["rows"].values():
        assert entry["whole_bitwise"] is True
        assert entry["ran"] == {"plain": "plain", "armed": "armed", "rank": "rank"}
        assert set(entry["arms"]) == {"plain", "armed", "rank", "whole", "whole again"}
        for arm in entry["arms"].values():
            assert arm["count"] == len(arm["samples"]) >= 2 and arm["median"] > 0
            assert arm["against_whole"]["low"] <= arm["against_whole"]["high"]
        assert found.results["floor_ms"] < entry["floor_with_kv_ms"] < entry["arms"]["plain"]["median"]


def test_the_report_shows_ratios_and_the_floor(tmp_path: Path) -> None:
    text = report.write(record(), tmp_path).read_text()
    assert "Device time of a decode step, 2 rows" in text and "edit_rank 2" in text
    assert "the same bits as plain" in text and "floor: weights and KV read once" in text


def test_a_graph_with_another_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replays, "whole", lambda self: self.ours("armed"))  # its edits act
    found = run(find("steps"), QUICK, lambda line: None)
    arms = found.results["rows"]["1"]["arms"]
    assert not found.right and "refused" in arms["whole"] and "refused" in arms["whole again"]
    assert arms["plain"]["median"] > 0 and "against_whole" not in arms["plain"]


def test_a_graph_of_ours_that_the_sessions_do_not_confirm_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = Replays.ours
    monkeypatch.setattr(Replays, "ours", lambda self, variant: prepare(self, "armed" if variant == "rank" else variant))
    monkeypatch.setattr(Replays, "arm", lambda self: None)  # the edits do not act
    found = run(find("steps"), QUICK, lambda line: None)
    arms = found.results["rows"]["1"]["arms"]
    assert not found.right and "refused" in arms["armed"] and arms["plain"]["median"] > 0


def test_the_whole_program_is_one_segment_of_the_same_graph() -> None:
    plain = loop_of(compiled()).prepare(1, "plain").program
    whole = whole_program(compiled(), plain)
    assert len(whole.segments) == 1 < len(plain.segments)
    assert whole.sites == () and whole.shape == plain.shape
    assert {id(weight) for weight in whole.weights.values()} == {id(weight) for weight in plain.weights.values()}


def test_replays_begin_where_the_sessions_stand() -> None:
    dj = compiled()
    with dj.session() as session:
        session.generate([5, 6, 7], max_new_tokens=1).run_to_end()
        replays = Replays(dj, [session])
        plain = replays.ours("plain")
        first = replays.answer(plain, 4)
        assert replays.seconds(plain, 5, 2) > 0
        lengths = replays._loop.lanes.env(plain.program.shape, "plain")[LENGTHS]
        assert lengths.tolist() == [4 + 7]  # warm ones too, from the session's end
        again = replays.answer(plain, 4)
        assert first.logits is not None and again.logits is not None and same_bits(first.logits, again.logits)
        result = session.generate(None, max_new_tokens=4, output_logits=True).result()
        assert result.logits is not None and same_bits(result.logits[None], first.logits)
