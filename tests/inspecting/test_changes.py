"""What passes did, by origin; folding; what is asked for and is not there."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from djinn_fx.errors import InvalidValue, UnknownSite
from djinn_fx.inspecting.changes import changes, find_pass
from djinn_fx.inspecting.fold import blocks, graph_lines
from djinn_fx.inspecting.making import Choice, program_of, read_trace, subject, trace_of
from djinn_fx.inspecting.measuring import measure
from djinn_fx.inspecting.names import Names, references, substitute
from djinn_fx.inspecting.text import Asked, render
from djinn_fx.passes.pipeline import PASSES
from djinn_fx.passes.trace import read, write
from tests.inspecting.subjects import llama_config, made, trace


def test_a_change_is_counted_by_origin_not_by_name() -> None:
    record = find_pass(trace("llama-4"), "steer")
    what = changes(trace("llama-4"))[record.index]
    before, after = {i.origin for i in record.before}, {i.origin for i in record.after}
    assert set(what.made) == after - before
    assert set(what.removed) == before - after
    by_origin = {info.origin: info for info in record.after}
    assert len(what.replaced) == 4
    for old, new in what.replaced:
        assert by_origin[old].site.startswith("resid_post.")
        assert by_origin[new].target == "aten.where.self"
        assert by_origin[new].site == by_origin[old].site.split()[0]


def test_passes_that_do_nothing_say_so() -> None:
    found = dict(zip((r.name for r in trace("llama-4").records), changes(trace("llama-4")), strict=True))
    assert str(found["head"]) == "no change"
    assert found["split"].segments
    assert not found["split"].made


def test_every_line_is_python_and_reads_what_is_there() -> None:
    for record in trace("storyteller").records:
        names = Names.of(record.after)
        known = {info.origin for info in record.after}
        for info in record.after:
            if info.op == "call_function":
                assert set(references(info.args)) <= known
                ast.parse(names.statement(info))


def test_references_are_not_looked_for_in_strings() -> None:
    assert references("%3, 'a %7', [%12]") == [3, 12]
    assert substitute("%3, 'a %7'", lambda origin: f"v{origin}") == "v3, 'a %7'"


@pytest.mark.parametrize("name", [record for record in PASSES if record not in ("projections", "residuals")])
def test_equal_layers_are_folded_and_nothing_is_lost(name: str) -> None:
    record = find_pass(trace("llama-8"), name)
    inputs = {info.origin: info.target for info in record.after if info.op == "placeholder"}
    lines = graph_lines(record.after, record.segments)
    folded = blocks(lines, inputs)
    equal = [block for block in folded if block.equals]
    assert len(equal) == 1
    assert equal[0].layer == ("model.layers", 1)
    assert [layer for _, layer in equal[0].equals][:5] == [2, 3, 4, 5, 6]
    assert sum(len(block.lines) * (1 + len(block.equals)) for block in folded) == len(lines)


def test_layers_that_differ_are_not_folded() -> None:
    uneven = trace_of(made("llama-4"), Choice(sites=("resid_post.0", "resid_post.2", "mlp_out.2")))
    record = uneven.records[-1]
    inputs = {info.origin: info.target for info in record.after if info.op == "placeholder"}
    folded = blocks(graph_lines(record.after, record.segments), inputs)
    assert not any(block.equals for block in folded)


def test_live_values_say_who_made_them() -> None:
    segments = find_pass(trace("llama-4"), "yields").segments
    assert {value.made_by for value in segments[0].live} == {"model.rotary_emb", "model.layers.0"}
    by_origin = {info.origin: info for info in trace("llama-4").records[-1].after}
    for segment in segments:
        assert segment.live_bytes == sum(value.nbytes for value in segment.live)
        assert all(by_origin[value.origin].shape == value.shape for value in segment.live)


def test_records_say_what_the_program_is() -> None:
    program = program_of(made("llama-4"), Choice())
    for segment, info in zip(program.segments, program.records[-1].segments, strict=True):
        assert (segment.name, segment.inputs, segment.outputs) == (info.name, info.inputs, info.outputs)
        assert segment.compile_class == info.compile_class
        assert [value.nbytes for value in segment.live] == [value.nbytes for value in info.live]
        assert len(segment.weights) == info.weights


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (Asked(after="stear"), InvalidValue, "nearest: steer"),
        (Asked(layer=9), InvalidValue, "layers are 0 to 3"),
        (Asked(site="resid_pots.1"), UnknownSite, "nearest: resid_post.1"),
    ],
)
def test_what_is_not_there_is_told(asked: Asked, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        render(trace("llama-4"), asked)


def test_stop_after_runs_no_further_pass() -> None:
    for last in ("annotate", "roles", "split"):
        assert trace_of(made("llama-4"), Choice(), last).records[-1].name == last
    with pytest.raises(InvalidValue, match="nearest: yields"):
        trace_of(made("llama-4"), Choice(), "yield")


def test_a_trace_survives_a_file(tmp_path: Path) -> None:
    path = write(trace("llama-4"), tmp_path / "a.jsonl")
    assert read(path) == trace("llama-4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(InvalidValue, match="not a whole trace"):
        read(path)
    path.write_text("not json", encoding="utf-8")
    with pytest.raises(InvalidValue, match="not a whole trace"):
        read(path)
    path.write_text(json.dumps({"djinn_trace": 9}), encoding="utf-8")
    with pytest.raises(InvalidValue, match="format 9"):
        read(path)
    with pytest.raises(InvalidValue, match=r"nearest beside it: a\.jsonl"):
        read_trace(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "damage", ['"seconds":"x"', '"segments":[7]', '"verdict":null', '"after":[["q","a","a","a","a","a","a","a","a"]]']
)
def test_a_trace_with_values_of_other_types_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(trace("llama-4"), tmp_path / "a.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | json.loads(f"{{{damage}}}"))
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InvalidValue, match="not a whole trace"):
        read(path)


@pytest.mark.gpu
def test_compiled_segments_are_measured_on_a_gpu() -> None:
    model: Any = LlamaForCausalLM(llama_config(2))
    model = model.to("cuda", torch.bfloat16).eval()
    costs = measure(subject("llama", model, Choice()), Choice(), "inductor", lambda text: None)
    assert all(cost.microseconds > 0 and cost.kernels > 0 for cost in costs)
    assert [cost.arming is None for cost in costs] == [False, False, True]


def test_segments_are_measured() -> None:
    costs = measure(made("llama-4"), Choice(), "eager", lambda text: None)
    assert [cost.name for cost in costs] == [f"segment_{i}" for i in range(5)]
    assert all(cost.microseconds > 0 and cost.kernels > 0 for cost in costs)
    assert costs[1].kernels == costs[2].kernels
    assert [cost.fusions_lost for cost in costs] == [3, 3, 3, 2, None]  # the norm, twice, and the sum
    assert [cost.arming is None for cost in costs] == [False] * 4 + [True]
