"""The harvest benchmark on a tiny model: the same values from each arm, a wrong one has no speed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from djinn_fx.benchmarks import harvest, models, report
from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.record import Record
from djinn_fx.benchmarks.registry import find, run

QUICK = Options(model="tiny", device="cpu", quick=True)
ARMS = {"djinn_fx", "hooks", "hooks, ended"}


@cache
def record() -> Record:
    return run(find("harvest"), QUICK, lambda line: None)


def test_every_arm_is_right_and_timed() -> None:
    found = record()
    assert found.right, [check for check in found.checks if not check.held]
    assert [len(entry["layers"]) for entry in found.results["cases"].values()] == [2, 4]
    tokens = found.results["sizes"]["rows"] * found.results["sizes"]["length"]
    for entry in found.results["cases"].values():
        assert set(entry["arms"]) == ARMS
        for arm in entry["arms"].values():
            assert arm["count"] == found.results["sizes"]["rounds"]
            assert arm["tokens_per_second"] == pytest.approx(1e3 * tokens / arm["median"])
            assert arm["against_hooks"]["low"] <= arm["against_hooks"]["high"]


def test_the_report_shows_each_system(tmp_path: Path) -> None:
    text = report.write(record(), tmp_path).read_text()
    assert "Harvesting activations of every layer" in text and "Hugging Face eager + forward hooks" in text


def test_values_of_other_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = harvest.ours

    def shifted(dj: Any, layers: tuple[int, ...], tokens: torch.Tensor) -> harvest.Values:
        found = right(dj, layers, tokens)
        return dict(zip(layers, [*list(found.values())[1:], found[layers[0]]], strict=True))

    monkeypatch.setattr(harvest, "ours", shifted)
    found = run(find("harvest"), QUICK, lambda line: None)
    arms = found.results["cases"]["every layer"]["arms"]
    assert not found.right and "refused" in arms["djinn_fx"] and arms["hooks"]["median"] > 0


def test_ended_hooks_run_no_block_behind_the_last_wanted_one() -> None:
    loaded = models.load("tiny", torch.device("cpu"), torch.float32)
    ran: list[int] = []
    for layer in range(loaded.layers):
        loaded.block(layer).register_forward_pre_hook(lambda module, inputs, layer=layer: ran.append(layer))
    values = harvest.hooks(loaded, (0, 1), True, loaded.prompts(2, 8, 0))
    assert ran == [0, 1] and set(values) == {0, 1} and values[1].shape == (2, 8, 64)
