"""Capture: the user's model is left alone, and what cannot be captured is named."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from djinn_fx.errors import CaptureError, InternalError
from djinn_fx.passes import hf
from djinn_fx.passes.graph import ENV, NAMES, aten, compute_nodes, mutated_inputs
from djinn_fx.passes.pipeline import build, discover
from djinn_fx.passes.source import clone_of, flatten_inputs, normalise_inputs, prepare
from djinn_fx.specs import ProgramShape
from tests.passes.tiny import Machine, tiny_model


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything about a model that capture might disturb."""
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), module.training, sorted(module.__dict__))
        for module in model.modules()
    ]
    tensors = [(id(tensor), tensor._version, tensor.requires_grad) for tensor in model.parameters()]
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [copy.deepcopy(config.to_dict()) for config in found if config]
    implementations = [config._attn_implementation for config in found if config]
    return [hooks, tensors, configs, implementations]


@pytest.mark.parametrize("case", ["gpt2", "gemma3", "mixtral"])
def test_the_users_model_is_not_touched(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a moment: the model is looked at in the middle of the export too."""
    model = tiny_model(case)
    before = fingerprint(model)
    during: list[bool] = []
    export = torch.export.export

    def watched(*args: Any, **kwargs: Any) -> Any:
        during.append(fingerprint(model) == before)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", watched)
    Machine(model).build((1, 2, 1))
    assert during == [True, True]
    assert fingerprint(model) == before


def test_a_clone_shares_every_tensor() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    clone = clone_of(model)
    ours, theirs = dict(model.named_parameters()), dict(clone.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    assert all(a is b for a, b in zip(model.buffers(), clone.buffers(), strict=True))
    assert clone.get_parameter("lm_head.weight") is clone.get_parameter("model.embed_tokens.weight")
    assert clone.config is not model.config


def test_weights_edited_in_place_are_seen(gpt2: Machine) -> None:
    machine = Machine(tiny_model("gpt2"))
    program = machine.build((1, 2, 2))
    before = machine.logits(program, [(0, 0, [3, 4])])
    with torch.no_grad():
        machine.model.transformer.h[0].mlp.c_fc.weight.mul_(2.0)
        expected = machine.model(torch.tensor([[3, 4]])).logits
    after = machine.logits(program, [(0, 0, [3, 4])])
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(after, before)


@torch.no_grad()
def test_traces_of_earlier_use_do_not_matter() -> None:
    """Recording hidden states leaves hooks, generating may leave a cache; neither is the user's hook."""
    model = tiny_model("mixtral")
    tokens = torch.randint(3, 250, (1, 4))
    expected = model(tokens, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    model.generate(tokens, max_new_tokens=2, do_sample=False, cache_implementation="static")
    model.config.output_hidden_states = True
    model.config.output_router_logits = True
    before = fingerprint(model)
    machine = Machine(model)
    logits = machine.logits(machine.build((1, 4, 4)), [(0, 0, tokens[0].tolist())])
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    assert fingerprint(model) == before
    assert getattr(machine.source.clone, "_cache", None) is None


def test_what_cannot_be_cloned_is_named() -> None:
    module = nn.Linear(2, 2).eval()
    module.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(CaptureError, match="Linear cannot be cloned"):
        prepare(module, (torch.zeros(1, 2),))


def test_tensors_in_plain_attributes_are_shared() -> None:
    module = nn.Linear(2, 2).eval()
    module.table = {"a": [torch.zeros(3)]}  # type: ignore[assignment]
    clone: Any = clone_of(module)
    assert clone.table["a"][0] is module.table["a"][0]  # type: ignore[index]
    assert clone.table is not module.table


def test_what_prepare_says_of_a_model() -> None:
    source = prepare(tiny_model("gemma2"))
    assert (source.kind, source.dtype, source.device.type) == ("lm", torch.float32, "cpu")
    assert source.windows == (16, None)
    assert source.vocab_size == 256
    assert source.model_type == "gemma2"
    assert [(spec.heads, spec.key_dim, spec.value_dim) for spec in source.kv] == [(2, 16, 16)] * 2
    latent = prepare(tiny_model("deepseek_v3"))
    assert [(spec.heads, spec.key_dim, spec.value_dim) for spec in latent.kv] == [(4, 16, 16)] * 2


def test_no_write_but_to_the_arena_is_left() -> None:
    """DeepSeek fills keys in place, mixtures mask in place: after capture nothing does."""
    for case in ("deepseek_v3", "gpt_oss"):
        machine = Machine(tiny_model(case))
        graph = next(iter(machine.store.captured.values())).graph
        writes = {str(node.target) for node in compute_nodes(graph) if mutated_inputs(node)}
        assert writes == {"djinn.kv_write.default"}


class Wrapped(nn.Module):
    """A module whose forward is given as a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def capture(function: Any) -> Any:
    source = prepare(Wrapped(function).eval(), (torch.randn(2, 4),))
    return discover(source)


def item(self: Any, x: torch.Tensor) -> Any:
    return self.first(x) if x.sum().item() > 0 else self.second(x)


def counting(self: Any, x: torch.Tensor) -> Any:
    self.count += 1
    return self.first(x) * self.count


def under_autocast(self: Any, x: torch.Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.first(x)


def branching(self: Any, x: torch.Tensor) -> Any:
    out: torch.Tensor = torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))
    return self.first(out)


class Odd:
    """A type that no pytree knows."""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (item, ["x.sum().item() > 0", "cannot be captured"]),
        (counting, ["'count'", "in-place", "add_"]),
        (under_autocast, ["autocast", "bfloat16"]),
        (branching, ["cond", "control flow"]),
        (lambda self, x: Odd(), ["Odd", "tensors only"]),
    ],
)
def test_what_cannot_be_captured_is_named(function: Any, words: list[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(function)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def grad_regions(self: Any, x: torch.Tensor) -> Any:
    with torch.enable_grad():
        y = self.first(x)
    with torch.autocast("cpu", enabled=False):
        return self.second(y) + y


def test_regions_that_compute_nothing_are_inlined() -> None:
    table = capture(grad_regions)
    assert {"first", "second"} <= {site.name for site in table.sites}


def test_an_attention_that_is_not_ours_is_refused() -> None:
    """Through the attention function itself: masks, shared caches and cross attention."""
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8)
    rows = torch.zeros(1, dtype=torch.long)

    def attend(query: Any, key: Any, mask: Any = None, layer: int | None = 0, **kwargs: Any) -> None:
        step = hf.Step(rows, rows, rows, None, pending=layer)
        with hf.stepping(step):
            hf.attention(nn.Identity(), query, key, key, mask, **kwargs)

    attend(q, k)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"layer": None}, "cache of its own"),
        ({"mask": torch.zeros(1)}, "mask of its own"),
        ({"key": torch.zeros(1, 2, 9, 8)}, "other tokens"),
        ({"is_causal": False}, "not causal"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"sliding_window": torch.zeros(1)}, "sliding_window"),
    ]
    for arguments, words in refused:
        with pytest.raises(CaptureError, match=words):
            attend(**{"query": q, "key": k, **arguments})


def test_a_model_that_ignores_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count a cached sequence from 0 at every step, silently."""
    machine = tiny_model("gpt2")
    source = prepare(machine)
    inner: Any = source.clone.transformer
    forward = inner.forward

    def deaf(*args: Any, **kwargs: Any) -> Any:
        kwargs["position_ids"] = torch.zeros(kwargs["position_ids"].shape, dtype=torch.long)
        return forward(*args, **kwargs)

    monkeypatch.setattr(inner, "forward", deaf)
    with pytest.raises(CaptureError, match="ignores position_ids"):
        discover(source)


def test_inputs_of_plain_modules_are_normalised() -> None:
    x = torch.zeros(2)
    assert normalise_inputs(x) == ((x,), {})
    assert normalise_inputs([x, 1]) == ((x, 1), {})
    assert normalise_inputs({"x": x}) == ((), {"x": x})
    assert normalise_inputs(((x,), {"y": 1})) == ((x,), {"y": 1})
    with pytest.raises(CaptureError, match="example_inputs"):
        normalise_inputs(3)
    tensors, key = flatten_inputs(((x, 2), {"y": [x, None]}))
    assert [name for name, _ in tensors.items()] == ["in.0", "in.2"]
    assert key == flatten_inputs(((x + 1, 2), {"y": [x, None]}))[1]
    assert key != flatten_inputs(((x, 3), {"y": [x, None]}))[1]
    assert key != flatten_inputs(((x.double(), 2), {"y": [x, None]}))[1]


def test_a_site_that_another_shape_lacks_is_our_bug(gpt2: Machine) -> None:
    site = replace(gpt2.table.get("resid_post.0"), name="resid_post.9")
    with pytest.raises(InternalError, match=r"resid_post\.9"):
        build(gpt2.source, ProgramShape(1, 1, 1), sites=[site], variant="plain", rank=0, arenas=gpt2.arenas)


def test_dead_values_are_dropped_and_named_ones_kept(gpt2: Machine) -> None:
    graph = next(iter(gpt2.store.captured.values())).graph
    for node in compute_nodes(graph):
        assert node.users or node.meta[NAMES] or mutated_inputs(node)
    assert all(node.target is not aten._assert_tensor_metadata.default for node in graph.graph.nodes)
    assert all(ENV in node.meta for node in graph.graph.nodes if node.op == "placeholder")


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "phimoe"])
@torch.no_grad()
def test_every_experts_implementation_computes_the_same(case: str) -> None:
    """The one for CUDA dtypes without a grouped product included; infinities do not leak into other tokens."""
    model = tiny_model(case)
    module = next(m for m in model.modules() if hasattr(m, "down_proj") and m.down_proj.dim() == 3)
    tokens, count = 7, module.num_experts
    hidden = torch.randn(tokens, 64)
    index = torch.stack([torch.randperm(count)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2)
    expected = module(hidden, index, weights)
    torch.testing.assert_close(hf.dense_experts(module, hidden, index, weights), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hf.experts(module, hidden, index, weights), expected, atol=1e-6, rtol=1e-5)
    hidden[0] = float("inf")
    assert bool(hf.dense_experts(module, hidden, index, weights)[1:].isfinite().all())
