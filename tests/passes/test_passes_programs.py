"""What a program promises: boundaries, live sets, weights, classes, the head, and stopping anywhere."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from djinn_fx.errors import InvalidValue
from djinn_fx.passes.lower import compile_class
from djinn_fx.program import KEEP, LENGTHS, LOGITS, POSITIONS, ROWS, TOKENS, kv_name
from tests.passes.tiny import Machine, run, same_bits, tiny_model

ALL = "*"


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
@torch.no_grad()
def test_any_cut_gives_the_bits_of_no_cut(name: str, request: pytest.FixtureRequest) -> None:
    """A program cut at every site and the same graph in one segment agree bit for bit."""
    machine: Machine = request.getfixturevalue(name)
    steps = [(0, 0, [3, 4, 5, 6])]
    cut, whole = machine.build((1, 4, 4), ALL), machine.build((1, 4, 4), ALL, cuts="none")
    assert len(whole.segments) == 1
    assert len(cut.segments) >= len(cut.sites)
    first = run(cut, machine.env(cut, steps))
    assert same_bits(first[LOGITS], run(whole, machine.env(whole, steps))[LOGITS])


@torch.no_grad()
def test_a_boundary_needs_only_its_live_set(llama: Machine) -> None:
    """From weights, inputs and the stated live set alone the rest of the program runs."""
    program = llama.build((1, 4, 1), ALL)
    inputs = llama.env(program, [(0, 0, [3, 4, 5, 6])])
    everything = run(program, inputs)
    for segment in program.segments[:-1]:
        alone = {spec.name: everything[spec.name].clone() for spec in segment.live}
        rest = run(program, {**inputs, **alone}, start=segment.index + 1)
        assert same_bits(rest[LOGITS], everything[LOGITS])
        for spec in segment.live:
            value = everything[spec.name]
            assert (tuple(value.shape), value.dtype) == (spec.shape, spec.dtype)
            assert spec.nbytes == value.numel() * value.element_size()


def test_live_values_of_a_layer_boundary(llama: Machine) -> None:
    """Between blocks only the residual and the rotary embedding live; the tail needs the residual."""
    program = llama.build((1, 4, 1), "resid_post")
    first, last = (segment.live for segment in program.segments[:2])
    assert [spec.name for spec in last] == ["resid_post.1"]
    assert first[-1].name == "resid_post.0"
    assert {spec.made_by for spec in first[:-1]} == {"model.rotary_emb"}
    assert program.segments[2].live == program.segments[-1].live
    assert [spec.name for spec in program.segments[-1].live] == [LOGITS]


def test_views_name_the_value_they_share_storage_with(opt: Machine) -> None:
    """OPT's MLP works on a view of the residual: both cross the boundary, one of them is a view."""
    program = opt.build((1, 4, 1), ["mlp_act.0"])
    live = {spec.name: spec for spec in program.segments[0].live}
    assert "mlp_act.0" in live
    aliased = [spec for spec in live.values() if spec.alias_of is not None]
    for spec in aliased:
        assert spec.alias_of in live or spec.alias_of in {v.name for v in program.inputs}


@torch.no_grad()
def test_a_sites_value_has_the_sites_layout(opt: Machine) -> None:
    program = opt.build((2, 3, 3), ALL)
    env = run(program, opt.env(program, [(0, 0, [3, 4, 5]), (1, 0, [6, 7, 8])]))
    flat = {site.name for site in program.sites if site.layout == "flat"}
    heads = {site.name for site in program.sites if site.layout == "heads"}
    assert {"mlp_act.0", "mlp_out.1"} <= flat
    assert {"attn_q.0", "attn_k.0", "attn_v.1"} <= heads
    for site in program.sites:
        assert env[site.name].shape == (2, 3, *site.feature_shape)
        assert env[site.name].is_contiguous()


@torch.no_grad()
def test_replacing_a_value_acts_on_the_rest(opt: Machine) -> None:
    """At a stop the value may be exchanged; in every layout the rest of the program reads it."""
    for name in ("attn_q.0", "mlp_act.0", "attn_z.1", "resid_mid.1", "logits"):
        program = opt.build((1, 4, 4), [name])
        env = run(program, opt.env(program, [(0, 0, [3, 4, 5, 6])]))
        changed = {**env, name: torch.zeros_like(env[name])}
        logits = run(program, changed, start=1)[LOGITS]
        assert not torch.equal(logits, env[LOGITS]), name


def test_weights_are_the_models_own(llama: Machine) -> None:
    program = llama.build((1, 1, 1))
    own = {f"w.{name}": tensor for name, tensor in llama.model.named_parameters()}
    own |= {f"w.{name}": tensor for name, tensor in llama.model.named_buffers()}
    assert set(program.weights) <= set(own)
    assert {f"w.{name}" for name, _ in llama.model.named_parameters()} <= set(program.weights)
    for name, tensor in program.weights.items():
        assert tensor.data_ptr() == own[name].data_ptr()
        assert not tensor.requires_grad
    used = {name for segment in program.segments for name in segment.weights}
    assert used == set(program.weights)


def test_tied_weights_are_one_input() -> None:
    machine = Machine(tiny_model("gpt2"))
    program = machine.build((1, 1, 1))
    names = [name for name in program.weights if "wte" in name or "lm_head" in name]
    assert names == ["w.transformer.wte.weight"]
    assert names[0] in program.segments[0].weights
    assert names[0] in program.segments[-1].weights


def test_inputs_are_named_as_agreed(gpt2: Machine) -> None:
    program = gpt2.build((2, 4, 1))
    arenas = [kv_name(layer, part) for part in "kv" for layer in (0, 1)]
    names = [spec.name for spec in program.inputs]
    assert names == [TOKENS, POSITIONS, ROWS, LENGTHS, *arenas, KEEP]
    assert program.outputs == (LOGITS,)
    declared = set(names) | set(program.weights)
    made: set[str] = set()
    for segment in program.segments:
        assert set(segment.inputs) <= declared | made
        made |= set(segment.outputs)


def test_equal_layers_share_a_class() -> None:
    machine = Machine(tiny_model("llama", num_hidden_layers=4))
    classes = [segment.compile_class for segment in machine.build((1, 1, 1)).segments]
    assert Counter(classes).most_common(1)[0][1] == 3
    assert len(set(classes)) == 3
    armed = [segment.compile_class for segment in machine.build((1, 1, 1), variant="armed").segments]
    assert len(set(armed)) == 3
    assert not set(armed[:-1]) & set(classes[:-1])
    wider = [segment.compile_class for segment in machine.build((2, 1, 1)).segments]
    assert not set(wider) & set(classes)


def test_a_window_is_part_of_the_class() -> None:
    machine = Machine(tiny_model("gpt_oss"))
    sliding, full, _ = (segment.graph for segment in machine.build((1, 1, 1)).segments)
    assert compile_class(sliding) != compile_class(full)


@pytest.mark.parametrize("keep", [1, 2, 5])
@torch.no_grad()
def test_only_kept_positions_reach_the_head(gpt2: Machine, keep: int) -> None:
    steps = [(0, 0, [3, 4, 5, 6, 7]), (1, 0, [8, 9, 10, 11, 12])]
    whole = gpt2.build((2, 5, 5), ["final_norm", "logits"])
    every = run(whole, gpt2.env(whole, steps))
    program = gpt2.build((2, 5, keep), ["final_norm", "logits"])
    inputs = gpt2.env(program, steps)
    if keep == 2:
        inputs[KEEP] = torch.tensor([[4, 0], [2, 2]])
    env = run(program, inputs)
    index = inputs[KEEP] if keep < 5 else torch.arange(5).expand(2, 5)
    chosen = torch.stack([every[LOGITS][row, index[row]] for row in (0, 1)])
    torch.testing.assert_close(env[LOGITS], chosen, atol=1e-6, rtol=0)
    assert same_bits(env["final_norm"], every["final_norm"])
    gathers = sum("gather" in info.target for info in program.records[-1].after)
    assert gathers == (keep < 5)


@torch.no_grad()
def test_a_head_that_cannot_be_narrowed_is_narrowed_behind() -> None:
    """Where the head's shapes are written into the graph, the logits are gathered instead."""
    model = tiny_model("llama")
    weight: torch.Tensor = model.lm_head.weight

    class Stubborn(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, query, width = x.shape
            flat: torch.Tensor = x.reshape(rows * query, width) @ weight.t()
            return flat.view(rows, query, -1)

    model.lm_head = Stubborn().eval()
    tokens = [3, 4, 5, 6]
    expected = model(torch.tensor([tokens])).logits
    machine = Machine(model)
    program = machine.build((1, 4, 2), ["final_norm", "logits"])
    env = run(program, machine.env(program, [(0, 0, tokens)]))
    torch.testing.assert_close(env[LOGITS], expected[:, 2:], atol=1e-5, rtol=0)
    assert env["final_norm"].shape == (1, 4, 64)
    last = [info.target for info in program.records[3].after if info.op == "call_function"][-1]
    assert last == "aten.gather.default"


@torch.no_grad()
def test_rows_and_pads_do_not_disturb_each_other(llama: Machine) -> None:
    """A dead row and padded tokens change no other row's logits."""
    alone = llama.build((1, 3, 1))
    expected = llama.logits(alone, [(0, 0, [3, 4, 5])])
    program = llama.build((3, 5, 1))
    logits = llama.logits(program, [(1, 0, [3, 4, 5]), (0, 0, [9, 8, 7, 6, 5])])
    torch.testing.assert_close(logits[0], expected[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 0), (1, 2, 3), (1, 2, 0)])
def test_an_impossible_shape_is_refused(gpt2: Machine, shape: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidValue, match="rows"):
        gpt2.build(shape)


def test_a_captured_shape_is_not_captured_again() -> None:
    machine = Machine(tiny_model("gpt2"))
    machine.build((1, 2, 1))
    graphs = [captured.graph for captured in machine.store.captured.values()]
    sizes = [len(graph.graph.nodes) for graph in graphs]
    first = machine.build((1, 2, 2), "mlp_out", "rank", 2)
    second = machine.build((1, 2, 2), "mlp_out", "rank", 2)
    assert [captured.graph for captured in machine.store.captured.values()] == graphs
    assert [len(graph.graph.nodes) for graph in graphs] == sizes
    assert [s.compile_class for s in first.segments] == [s.compile_class for s in second.segments]
    assert [s.outputs for s in first.segments] == [s.outputs for s in second.segments]


def test_every_pass_leaves_a_record(gpt2: Machine) -> None:
    program = gpt2.build((1, 1, 1), variant="armed")
    names = [record.name for record in program.records]
    assert names == ["capture", "annotate", "roles", "head", "steer", "split", "yields", "lower"]
    assert [record.index for record in program.records] == list(range(8))
    for earlier, later in zip(program.records, program.records[1:], strict=False):
        assert earlier.after == later.before
    assert all(record.verdict for record in program.records)
    split = program.records[5]
    kept = [info.origin for info in split.before if info.op == "call_function"]
    assert [info.origin for info in split.after if info.op == "call_function"] == kept
    named = {info.site for info in program.records[2].after if info.site}
    assert any("resid_post.1" in names for names in named)
