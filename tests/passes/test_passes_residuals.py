"""Linear layers joined with their residuals: which they are, that bits stay, and what steers them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn

from djinn_fx.passes.graph import aten, compute_nodes
from djinn_fx.passes.inductor import InductorLowering
from djinn_fx.passes.residuals import LINEAR_RESIDUAL
from djinn_fx.program import LOGITS, Program
from djinn_fx.specs import Variant
from tests.passes.tiny import Machine, run, same_bits, tiny_model

#: Joined layers in a model of two layers.
JOINED = {"gpt2": 4, "llama": 4, "llama-tied": 4, "gemma2": 0, "mixtral": 2, "phi": 2, "gpt_neox": 2, "opt-350m": 3}
STEPS = [(0, 0, [5]), (1, 0, [9])]


@pytest.fixture(scope="module", params=list(JOINED))
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(tiny_model(request.param, dtype=torch.bfloat16))


def joined(program: Program) -> list[fx.Node]:
    nodes = [node for segment in program.segments for node in compute_nodes(segment.graph)]
    return [node for node in nodes if node.target is LINEAR_RESIDUAL]


def edit(machine: Machine, program: Program) -> dict[str, Any]:
    """Inputs that steer row 0 at every site, and inject into row 1 at the last one."""
    inputs = machine.env(program, STEPS)
    generator = torch.Generator().manual_seed(0)
    for site in program.sites:
        for part, value in (("act", True), ("rank_act", True)):
            if f"{site.name}:{part}" in inputs:
                inputs[f"{site.name}:{part}"][0] = value
        for part in ("scale", "add", "read", "write"):
            table = inputs.get(f"{site.name}:{part}")
            if table is not None:
                table[0] = torch.randn(table[0].shape, generator=generator)
        if f"{site.name}:slot" in inputs:
            inputs[f"{site.name}:slot"][0] = True
    last = program.sites[-1].name
    inputs[f"{last}:inject"][1] = True
    inputs[f"{last}:tap"][1] = torch.randn(inputs[f"{last}:tap"][1].shape, generator=generator)
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "armed", "rank"])
def test_bits_stay(machine: Machine, variant: Variant, request: pytest.FixtureRequest) -> None:
    """Edits, injection and taps give the bits that the single ops give, in pieces and at sites."""
    case = request.node.callspec.params["machine"]
    results = []
    for options in ({"grouped": True}, {"grouped": True, "cuts": "layers"}, {}):
        program = machine.build((2, 1, 1), "resid_post", variant, 2 * (variant == "rank"), **options)
        assert len(joined(program)) == (JOINED[case] if options else 0)
        inputs = machine.env(program, STEPS) if variant == "plain" else edit(machine, program)
        made = run(program, inputs)
        taps = [inputs[f"{site.name}:tap"] for site in program.sites if variant != "plain"]
        results.append([made[LOGITS], *taps])
    for other in results[:2]:
        assert all(same_bits(one, two) for one, two in zip(other, results[2], strict=True))


def test_an_edit_costs_no_op_of_its_own(llama: Machine) -> None:
    """Armed, a step has the plain one's ops and the copies to the taps."""
    counts = []
    for variant in ("plain", "armed"):
        program = llama.build((2, 1, 1), "resid_post", variant, grouped=True, cuts="layers")
        nodes = [node for segment in program.segments for node in compute_nodes(segment.graph)]
        counts.append(Counter(str(node.target) for node in nodes))
    assert counts[1] - counts[0] == {str(aten.copy_.default): 2}
    assert not counts[0] - counts[1]


@torch.no_grad()
def test_chosen_sites_stay(llama: Machine) -> None:
    """A layer whose own value is asked for, or whose sum is steered, keeps it."""
    sites = ["mlp_out.0", "resid_mid.1", "resid_post.1"]
    results = []
    for grouped in (True, False):
        program = llama.build((2, 1, 1), sites, "armed", grouped=grouped)
        assert len(joined(program)) == (3 if grouped else 0)
        found = run(program, edit(llama, program))
        results.append([found[name] for name in (*sites, LOGITS)])
    assert all(same_bits(one, two) for one, two in zip(*results, strict=True))


def test_wide_steps_are_left_alone(llama: Machine) -> None:
    assert not joined(llama.build((2, 2, 1), "resid_post", grouped=True))
    assert not joined(llama.build((65, 1, 1), "resid_post", grouped=True))


@torch.no_grad()
def test_inductor_writes_taps_in_place() -> None:
    """Compiled, each kind of layer once, and the tap that the op writes is the caller's."""
    machine = Machine(tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=4))
    lowering = InductorLowering()
    for variant in ("armed", "rank"):
        program = machine.build(
            (2, 1, 1), "resid_post", variant, 2 * (variant == "rank"), lower=lowering, cuts="layers", grouped=True
        )
        eager = machine.build((2, 1, 1), "resid_post", variant, 2 * (variant == "rank"), cuts="layers", grouped=True)
        assert len({segment.compile_class for segment in program.segments}) == 3
        ours, theirs = edit(machine, program), edit(machine, eager)
        made, wanted = run(program, ours), run(eager, theirs)
        torch.testing.assert_close(made[LOGITS], wanted[LOGITS], atol=0.05, rtol=0.05)
        for site in program.sites:
            torch.testing.assert_close(ours[f"{site.name}:tap"], theirs[f"{site.name}:tap"], atol=0.05, rtol=0.05)


class Doubled(nn.Module):
    """A layer whose result is added to itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(x)
        return made + made


class Halves(nn.Module):
    """A layer for each half of the width, as heads may have one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(x.unflatten(-1, (2, 32)))
        return made.flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["doubled", "halves"])
def test_other_sums_stay(kind: str) -> None:
    """A layer that is both addends, and one whose columns are not those of the residual."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    block = model.model.layers[0]
    block.mlp = Doubled(block.mlp) if kind == "doubled" else Halves()
    machine, results = Machine(model.eval()), []
    for grouped in (True, False):
        program = machine.build((2, 1, 1), "resid_post", grouped=grouped)
        assert len(joined(program)) == (3 if grouped else 0)
        results.append(run(program, machine.env(program, STEPS))[LOGITS])
    assert same_bits(*results)
