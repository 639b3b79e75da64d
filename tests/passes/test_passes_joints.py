"""Programs that nobody stops inside: cut at joints, and compiled once a kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from djinn_fx.passes.inductor import InductorLowering
from djinn_fx.program import LOGITS
from djinn_fx.specs import Variant
from tests.passes.tiny import Machine, run, same_bits, tiny_model

DEPTHS = (3, 5)
CASES = ["gpt2", "gemma2", "qwen3_moe"]


def deep(case: str, layers: int) -> Machine:
    """A tiny model of some depth, all layers of one kind."""
    changes: dict[str, Any] = {"n_layer" if case == "gpt2" else "num_hidden_layers": layers}
    if case == "gpt2":
        changes["num_hidden_layers"] = layers
    if case == "gemma2":
        changes["layer_types"] = ["full_attention"] * layers
    if case == "qwen3_moe":
        changes["mlp_only_layers"] = []
    return Machine(tiny_model(case, **changes))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_kinds_of_segments_do_not_grow_with_depth(case: str) -> None:
    """A first, a middle and a last one, in either variant; and the bits of the uncut program."""
    kinds: dict[Variant, list[set[str]]] = {"plain": [], "armed": []}
    for layers in DEPTHS:
        machine = deep(case, layers)
        for variant, found in kinds.items():
            program = machine.build((2, 1, 1), "resid_post", variant, cuts="layers")
            assert len(program.segments) == layers + 1
            assert all(segment.site is None for segment in program.segments)
            found.append({segment.compile_class for segment in program.segments})
            whole = machine.build((2, 1, 1), "resid_post", variant, cuts="none")
            steps = [(0, 0, [3]), (1, 0, [7])]
            ours, theirs = (run(each, machine.env(each, steps))[LOGITS] for each in (program, whole))
            assert same_bits(ours, theirs)
    for found in kinds.values():
        assert [len(each) for each in found] == [3, 3]


def test_a_joint_costs_no_value_that_was_not_written_anyway() -> None:
    """Behind a block's last product only it and the residual are alive, beside what all layers share."""
    program = deep("gpt2", 3).build((2, 1, 1), "resid_post", cuts="layers")
    assert [len(segment.live) for segment in program.segments] == [2, 2, 2, 1]


@torch.no_grad()
def test_inductor_compiles_each_kind_once() -> None:
    """Counted: three compilations for a decode program of any depth, and none for what is known."""
    counts = []
    for layers in DEPTHS:
        lowering = InductorLowering()
        machine = deep("gpt2", layers)
        program = machine.build((1, 1, 1), "resid_post", "armed", lower=lowering, cuts="layers")
        counts.append(len(lowering.compiled))
        assert lowering.compilations == len(lowering.compiled)
        machine.build((1, 1, 1), "resid_post", "armed", lower=lowering, cuts="layers")
        assert lowering.compilations == counts[-1]
        eager = machine.build((1, 1, 1), "resid_post", "armed", cuts="layers")
        steps = [(0, 0, [3])]
        ours, theirs = (run(each, machine.env(each, steps))[LOGITS] for each in (program, eager))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert counts == [3, 3]
