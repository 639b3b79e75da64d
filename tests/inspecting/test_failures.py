"""A broken pass injected: the graph before it, the message and a script that fails in the same way."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from typer.testing import CliRunner

import djinn_fx as djinn
from djinn_fx.cli import app
from djinn_fx.errors import InternalError
from djinn_fx.inspecting.making import Choice, trace_of
from djinn_fx.passes import pipeline
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import compute_nodes
from djinn_fx.passes.trace import read
from tests.inspecting.subjects import made


def forgetful(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Loses a node that others read."""
    node = next(iter(compute_nodes(gm)))
    raise RuntimeError(f"{node.name} is lost")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The pass ``steer`` fails; temporary folders lie in the test's own."""
    stages = tuple(replace(s, run=forgetful) if s.name == "steer" else s for s in pipeline._BUILD)
    monkeypatch.setattr(pipeline, "_BUILD", stages)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_failing_pass_leaves_what_is_needed(broken: Path) -> None:
    trace = trace_of(made("llama-4"), Choice())
    assert trace.failure is not None
    assert [record.name for record in trace.records] == ["capture", "annotate", "roles", "head"]
    folder = Path(trace.failure.folder)
    assert folder.parent == broken
    before = (folder / "before.txt").read_text(encoding="utf-8").splitlines()
    assert len(before) == len(trace.records[-1].after)
    assert "is lost" in (folder / "error.txt").read_text(encoding="utf-8")
    again = read(folder / "passes.jsonl")
    assert again.failure == trace.failure
    assert again.records == trace.records
    with pytest.raises(InternalError, match="pass 'steer' broke stage 'steered': embedding is lost"):
        runpy.run_path(str(folder / "repro.py"))


def test_the_script_runs_where_nothing_is_broken(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = trace_of(made("llama-4"), Choice())
    assert trace.failure is not None
    monkeypatch.undo()
    done = runpy.run_path(str(Path(trace.failure.folder) / "repro.py"))
    assert len(done["program"].segments) == 5


def test_a_plain_modules_script_holds_the_module(broken: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    dj = djinn.compile(module, example_inputs=(torch.zeros(2, 3),))
    with pytest.raises(InternalError) as caught:
        dj(torch.zeros(2, 3))
    folder = Path(str(caught.value).split(" holds the graph")[0].split()[-1])
    assert (folder / "module.pt").is_file()
    with pytest.raises(InternalError, match="is lost"):
        runpy.run_path(str(folder / "repro.py"))


def test_on_failure_shows_the_graph_before(broken: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", "--on-failure"])
    assert shown.exit_code == 1
    assert "the graph before steer, which failed" in shown.output
    assert "aten.embedding(self.weight, tokens)" in shown.output
    assert "is lost" in shown.output
    assert "repro.py" in shown.output


def test_on_failure_is_silent_where_nothing_fails() -> None:
    shown = CliRunner().invoke(app, ["inspect", "--on-failure"])
    assert shown.exit_code == 0
    assert not shown.output.strip()
