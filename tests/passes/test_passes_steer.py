"""Edits, injections and taps: what they compute, and that doing nothing changes no bit."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from djinn_fx.program import Program
from djinn_fx.specs import Variant, edit_tables
from tests.passes.tiny import Machine, run, same_bits, site_named, tiny_model

TOKENS = [5, 6, 7, 8]
Env = dict[str, torch.Tensor]
VARIANTS: list[Variant] = ["armed", "rank"]
EDITED = ["resid_post.0", "attn_k.1", "mlp_out.1", "attn_z.0", "logits"]


def first_step(
    machine: Machine, variant: Variant, sites: list[str], rank: int = 2
) -> tuple[Program, dict[str, torch.Tensor]]:
    program = machine.build((1, 4, 4), sites, variant, rank)
    return program, machine.env(program, [(0, 0, TOKENS)])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "opt"])
@torch.no_grad()
def test_neutral_tables_change_no_bit(name: str, variant: Variant, request: pytest.FixtureRequest) -> None:
    machine: Machine = request.getfixturevalue(name)
    plain, inputs = first_step(machine, "plain", EDITED)
    expected = run(plain, inputs)
    program, inputs = first_step(machine, variant, EDITED)
    found = run(program, inputs)
    for site in program.sites:
        assert same_bits(found[site.name], expected[site.name])
        assert same_bits(inputs[f"{site.name}:tap"], expected[site.name])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gates", ["closed", "open"])
@torch.no_grad()
def test_odd_values_pass_neutral_edits(gpt2: Machine, variant: Variant, gates: str) -> None:
    """-0.0, infinities, subnormals and NaN come out as they went in, whatever an unused slot holds."""
    program, inputs = first_step(gpt2, variant, ["mlp_out.0", "resid_post.0"])
    odd = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1e-42, -1.5])
    value = odd.repeat(40)[: 4 * 64].view(1, 4, 64).contiguous()
    inputs["mlp_out.0:tap"].copy_(value)
    inputs["mlp_out.0:inject"].fill_(True)
    expected = run(program, inputs)
    assert same_bits(expected["mlp_out.0"], value)
    assert same_bits(inputs["mlp_out.0:tap"], value)
    if gates == "open":
        inputs["resid_post.0:act"].fill_(True)
    elif variant == "rank":
        inputs["resid_post.0:slot"].fill_(True)
    if variant == "rank":
        inputs["resid_post.0:write"][:, 0] = float("nan")
        inputs["resid_post.0:read"][:, 0] = float("inf")
    assert same_bits(run(program, inputs)["resid_post.0"], expected["resid_post.0"])


@torch.no_grad()
def test_an_unused_slot_poisons_nothing(gpt2: Machine) -> None:
    """The gate is open and slot 0 works; slot 1 is unused and full of NaN."""
    program, inputs = first_step(gpt2, "rank", ["resid_post.0"])
    name = "resid_post.0"
    inputs[f"{name}:rank_act"].fill_(True)
    inputs[f"{name}:slot"][:, 0] = True
    inputs[f"{name}:read"].normal_()
    inputs[f"{name}:write"].normal_()
    inputs[f"{name}:low"][:, 0] = 1.0
    expected = run(program, inputs)[name]
    for part in ("read", "write", "bias", "threshold", "low", "high", "strength"):
        inputs[f"{name}:{part}"][:, 1] = float("nan")
    assert same_bits(run(program, inputs)[name], expected)
    assert bool(expected.isfinite().all())


@torch.no_grad()
def test_scale_and_add_follow_the_rounding_of_the_tables() -> None:
    """bf16: the product is rounded before the sum; a table in fp32 keeps 0.9 as 0.9."""
    machine = Machine(tiny_model("gpt2", dtype=torch.bfloat16))
    plain, inputs = first_step(machine, "plain", ["resid_post.0"])
    value = run(plain, inputs)["resid_post.0"]
    program, inputs = first_step(machine, "armed", ["resid_post.0"])
    inputs["resid_post.0:scale"].fill_(0.9)
    vector = torch.linspace(-2, 2, 64)
    inputs["resid_post.0:add"].copy_(vector.expand(1, 1, 64))
    inputs["resid_post.0:act"][0, 1] = True
    found = run(program, inputs)["resid_post.0"]
    expected = value.clone()
    scaled = (value[0, 1].float() * 0.9).bfloat16()
    expected[0, 1] = (scaled.float() + vector).bfloat16()
    assert same_bits(found, expected)
    assert not same_bits(expected[0, 1], (value[0, 1].float() * 0.9 + vector).bfloat16())


@torch.no_grad()
def test_edit_acts_on_whoever_reads_the_value(llama: Machine) -> None:
    """Editing keys changes the arena and all that attention makes of it, and nothing before."""
    sites = ["attn_q.1", "attn_k.1", "attn_v.1", "attn_z.1"]
    program, inputs = first_step(llama, "armed", sites)
    before = run(program, dict(inputs))
    written = llama.arenas[1][0][0, :, :4].clone()
    inputs["attn_k.1:act"].fill_(True)
    inputs["attn_k.1:scale"].fill_(-2.0)
    after = run(program, inputs)
    assert torch.equal(llama.arenas[1][0][0, :, :4], -2 * written)
    assert torch.equal(after["attn_k.1"], -2 * before["attn_k.1"])
    assert torch.equal(after["attn_k.1"], llama.arenas[1][0][0, :, :4].transpose(0, 1)[None])
    assert same_bits(after["attn_q.1"], before["attn_q.1"])
    assert not torch.equal(after["attn_z.1"], before["attn_z.1"])
    # The first position sees only itself: whatever its key is, its weight is 1.
    torch.testing.assert_close(after["attn_z.1"][:, 0], before["attn_z.1"][:, 0])


@pytest.mark.parametrize("name", ["resid_post.0", "mlp_out.0", "attn_q.1", "mlp_act.1", "final_norm"])
@torch.no_grad()
def test_injection_goes_on_from_the_tap(opt: Machine, name: str) -> None:
    """A value that was computed once and injected gives the same logits as computing on."""
    program, inputs = first_step(opt, "armed", [name])
    first = run(program, inputs)
    value = first[name] * 1.5
    inputs[f"{name}:tap"].copy_(value)
    inputs[f"{name}:inject"].fill_(True)
    injected = run(program, inputs)["logits"]
    segment = program.segment_of(name)
    by_hand = run(program, {**first, name: value}, start=segment + 1)["logits"]
    assert same_bits(injected, by_hand)
    assert not torch.equal(injected, first["logits"])


def reference_rank(value: torch.Tensor, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """The rank edit written down again, in double precision, for one row and every slot."""
    h = value.double()
    change = torch.zeros_like(h)
    for slot in range(tables["slot"].shape[1]):
        if not tables["slot"][0, slot]:
            continue
        z = h @ tables["read"][0, slot].double() + tables["bias"][0, slot].double()
        kind = int(tables["kind"][0, slot])
        p = z
        if kind == 1:
            p = z.relu()
        if kind == 2:
            p = torch.where(z > tables["threshold"][0, slot], z, 0.0)
        target = p.clamp(float(tables["low"][0, slot]), float(tables["high"][0, slot]))
        change += (tables["strength"][0, slot] * (target - p))[..., None] * tables["write"][0, slot].double()
    return h + change


@pytest.mark.parametrize("kind", [0, 1, 2])
@torch.no_grad()
def test_rank_edit_sets_and_clamps_features(gpt2: Machine, kind: int) -> None:
    plain, inputs = first_step(gpt2, "plain", ["resid_mid.1"])
    value = run(plain, inputs)["resid_mid.1"]
    program, inputs = first_step(gpt2, "rank", ["resid_mid.1"], rank=3)
    site = site_named(program, "resid_mid.1")
    tables = {
        spec.name.rpartition(":")[2]: inputs[spec.name]
        for spec in edit_tables(site, program.shape, "rank", torch.float32, 3)
    }
    tables["rank_act"].fill_(True)
    tables["slot"][0, :2] = True
    tables["read"].normal_()
    tables["write"].normal_()
    tables["kind"].fill_(kind)
    tables["bias"].fill_(0.25)
    tables["threshold"].fill_(0.5)
    tables["low"][0, 0], tables["high"][0, 0] = 2.0, 2.0
    tables["high"][0, 1], tables["strength"][0, 1] = 0.1, 0.5
    found = run(program, inputs)["resid_mid.1"]
    torch.testing.assert_close(found.double(), reference_rank(value, tables), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, value)


@torch.no_grad()
def test_ablating_a_direction_leaves_nothing_of_it(gpt2: Machine) -> None:
    program, inputs = first_step(gpt2, "rank", ["resid_post.1"], rank=1)
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    inputs["resid_post.1:rank_act"].fill_(True)
    inputs["resid_post.1:slot"].fill_(True)
    inputs["resid_post.1:read"][0, 0] = direction
    inputs["resid_post.1:write"][0, 0] = direction
    inputs["resid_post.1:low"].fill_(0.0)
    inputs["resid_post.1:high"].fill_(0.0)
    found = run(program, inputs)["resid_post.1"]
    torch.testing.assert_close(found @ direction, torch.zeros(1, 4), atol=1e-5, rtol=0)


def test_ops_that_a_variant_adds(gpt2: Machine) -> None:
    """plain adds nothing; armed adds a product, a sum, two choices and a tap per site."""

    def ops(variant: Variant, rank: int = 0) -> Counter[str]:
        program = gpt2.build((1, 1, 1), "resid_post", variant, rank)
        return Counter(
            str(node.target)
            for segment in program.segments
            for node in segment.graph.graph.nodes
            if node.op == "call_function"
        )

    plain = ops("plain")
    annotated = gpt2.build((1, 1, 1), "resid_post").records[2].after
    assert plain == Counter(info.target for info in annotated if info.op == "call_function")
    added = ops("armed") - plain
    assert added == {"aten.mul.Tensor": 2, "aten.add.Tensor": 2, "aten.where.self": 4, "aten.copy_.default": 2}
    one, two = ops("rank", 1) - plain, ops("rank", 2) - plain
    assert one["aten.sum.dim_IntList"] == 2
    assert two["aten.sum.dim_IntList"] == 4
    assert two["aten.copy_.default"] == 2


def test_tables_are_inputs_in_order(gpt2: Machine) -> None:
    program = gpt2.build((2, 1, 1), ["resid_post.0", "attn_q.1"], "rank", 3)
    named = {spec.name: spec for spec in program.inputs}
    for site in program.sites:
        specs = edit_tables(site, program.shape, "rank", torch.float32, 3)
        assert [s.name for s in program.inputs if s.name.startswith(f"{site.name}:")] == [s.name for s in specs]
        for spec in specs:
            assert (named[spec.name].shape, named[spec.name].dtype) == (spec.shape, spec.dtype)


@torch.no_grad()
def test_variants_name_what_crosses_boundaries_alike(llama: Machine) -> None:
    """A step that was begun in one variant can go on in another one."""
    sites = ["attn_q.0", "attn_k.0", "resid_post.0", "mlp_act.1"]
    plain, armed = (llama.build((1, 4, 1), sites, variant) for variant in ("plain", "armed"))
    for ours, theirs in zip(plain.segments, armed.segments, strict=True):
        assert [v.name for v in ours.live] == [v.name for v in theirs.live]
    inputs = llama.env(armed, [(0, 0, TOKENS)])
    half = run(plain, inputs, stop=2)
    both = run(armed, {**half, **inputs}, start=2)["logits"]
    assert same_bits(both, run(plain, inputs)["logits"])
