"""Linear layers computed together: which they are, that the model stays equal and its sites in place."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

from djinn_fx.passes import pipeline
from djinn_fx.passes.graph import ENV, NAMES, ORIGIN, aten, compute_nodes, copy_graph
from djinn_fx.passes.projections import LINEARS, projections
from djinn_fx.passes.residuals import LINEAR_RESIDUAL
from djinn_fx.program import LOGITS, Program
from tests.passes.tiny import Machine, run, same_bits, tiny_model

#: Calls of djinn::linears in a model of two layers, by how many layers each computes.
GROUPS = {
    "gpt2": {1: 2 * 4 + 1},
    "llama": {3: 2, 1: 2 * 2 + 1, 2: 2},
    "llama-tied": {3: 2, 1: 2 * 2 + 1, 2: 2},
    "gemma2": {3: 2, 1: 2 * 2 + 1, 2: 2},
    "mixtral": {3: 2, 1: 2 * 2 + 1},
    "phi": {4: 2, 1: 2 * 2 + 1},
    "opt-350m": {3: 2, 1: 2 * 3 + 3},
    "opt": {3: 2, 1: 2 * 3 + 1},
}


@pytest.fixture(scope="module", params=list(GROUPS))
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(tiny_model(request.param))


def calls(program: Program) -> list[fx.Node]:
    parts = [segment.graph for segment in program.segments]
    return [node for part in parts for node in compute_nodes(part) if node.target in (LINEARS, LINEAR_RESIDUAL)]


def weights_of(call: fx.Node) -> list[fx.Node]:
    """The weights that a call reads; one, where a layer is joined with its residual."""
    given = call.args[1]
    return list(given) if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item, arg-type, unused-ignore]


def grouped(machine: Machine, *args: Any) -> Program:
    """The program with the pass."""
    return machine.build(*args, grouped=True)


@torch.no_grad()
def test_models_stay_equal(machine: Machine, request: pytest.FixtureRequest) -> None:
    case = request.node.callspec.params["machine"]
    program = grouped(machine, (2, 1, 1))
    sizes = Counter(len(weights_of(node)) for node in calls(program))
    assert dict(sizes) == GROUPS[case]
    steps = [(0, 0, [5]), (1, 0, [9])]
    wanted = machine.logits(machine.build((2, 1, 1)), steps)
    assert same_bits(machine.logits(program, steps), wanted)


@torch.no_grad()
def test_sites_keep_their_values_and_order(machine: Machine) -> None:
    """Every module's output is a site, those between two layers of a group included."""
    sites = [site.name for site in machine.table.sites if site.layout == "rows" and not site.name.endswith(":in")]
    steps = [(0, 0, [5]), (1, 0, [9])]
    for variant in ("plain", "armed"):
        program = grouped(machine, (2, 1, 1), sites, variant)
        found = run(program, machine.env(program, steps))
        other = machine.build((2, 1, 1), sites, variant)
        wanted = run(other, machine.env(other, steps))
        assert calls(program)
        for name in (*sites, LOGITS):
            assert same_bits(found[name], wanted[name]), name


@torch.no_grad()
def test_edits_reach_what_is_computed_together(llama: Machine) -> None:
    sites = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    sites += ["model.layers.1.input_layernorm", "model.layers.1.mlp.up_proj"]
    steps = [(0, 0, [5]), (1, 0, [9])]
    results = []
    for program in (
        grouped(llama, (2, 1, 1), sites, "armed"),
        llama.build((2, 1, 1), sites, "armed"),
    ):
        inputs = llama.env(program, steps)
        neutral = run(program, inputs)[LOGITS].clone()
        for name in sites:
            inputs[f"{name}:act"].fill_(True)
            inputs[f"{name}:scale"].fill_(1.5)
        results.append(run(program, inputs)[LOGITS])
        assert not torch.equal(results[-1], neutral)
    assert same_bits(*results)


def test_names_and_origins_move_to_the_results(llama: Machine) -> None:
    from djinn_fx.passes.context import PassContext
    from djinn_fx.specs import ProgramShape

    shape = ProgramShape(2, 1, 1)
    captured = pipeline._captured(llama.source, shape, llama.arenas, None, llama.store)
    before = {node.meta[ORIGIN]: node for node in compute_nodes(captured.graph) if node.target is aten.linear.default}
    gm = copy_graph(captured.graph)
    projections(gm, PassContext("lm", shape, torch.float32))
    gm.graph.lint()
    assert not [node for node in compute_nodes(gm) if node.target is aten.linear.default]
    after = {node.meta[ORIGIN]: node for node in compute_nodes(gm)}
    for origin, node in before.items():
        assert after[origin].target in (operator.getitem, aten.view.default)
        assert after[origin].meta[NAMES] == node.meta[NAMES]
    names = [name for node in compute_nodes(gm) for name in node.meta[NAMES]]
    assert names == [name for node in compute_nodes(captured.graph) for name in node.meta[NAMES]]
    assert all(ENV not in node.meta for node in compute_nodes(gm))


def test_wide_steps_are_left_alone(llama: Machine) -> None:
    assert calls(grouped(llama, (2, 32, 1)))
    assert not calls(grouped(llama, (1, 65, 1)))
    assert not calls(grouped(llama, (33, 2, 2)))


def test_experts_are_left_alone() -> None:
    machine = Machine(tiny_model("mixtral"))
    nodes = calls(grouped(machine, (2, 1, 1)))
    weights = {weight.meta[ENV] for node in nodes for weight in weights_of(node)}
    assert not [name for name in weights if "experts" in name]
    assert [name for name in weights if "gate" in name]
