"""Writes become values: the graph without them computes what the eager module computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from djinn_fx.errors import CaptureError
from djinn_fx.passes.functional import functional_twin
from djinn_fx.passes.graph import aten
from djinn_fx.passes.pipeline import build, discover
from djinn_fx.passes.source import flatten_inputs, prepare
from djinn_fx.specs import ProgramShape
from tests.passes.tiny import run

Function = Callable[[nn.Module, torch.Tensor], Any]


class Net(nn.Module):
    """Two linear layers, an activation in place, and whatever ``function`` does with them."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.a, self.b, self.r = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def whole(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    h += m.b(x)
    return h.mul_(2)


def stale_name(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    alias = h
    m.r(h)
    return alias + m.b(alias)


def through_slice(m: Any, x: torch.Tensor) -> Any:
    h = x.new_zeros(x.shape[0], 12)
    h[:, :6].copy_(m.a(x))
    h[:, 6:] = m.b(x)
    return h


def view_before_write(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    seen = h.view(2, 3, -1).transpose(0, 1)
    h[1] = 7.0
    return seen * 2


def write_through_views(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    h.view(-1, 3).t()[1].add_(1)
    h.unsqueeze(0).permute(2, 0, 1)[2:4].zero_()
    return m.b(h)


def write_to_a_chunk(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    left, right = h.chunk(2, dim=-1)
    right.mul_(3)
    first, *_ = h.unbind(1)
    first.fill_(0.5)
    left.add_(right)
    return h + m.b(x)


def other_dtype(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x).half()
    h.mul_(torch.full((6,), 1.0009765625))
    return h.float() + m.b(x)


def with_index(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    h[torch.tensor([0, 2]), torch.tensor([1, 1])] = 5.0
    h.masked_fill_(h > 4, -1.0)
    h.index_add_(0, torch.tensor([0, 0]), m.b(x)[:2])
    return h


def own_input(m: Any, x: torch.Tensor) -> Any:
    x.add_(1)
    return m.a(x)


FUNCTIONS = [
    whole,
    stale_name,
    through_slice,
    view_before_write,
    write_through_views,
    write_to_a_chunk,
    other_dtype,
    with_index,
    own_input,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@torch.no_grad()
def test_values_are_those_of_the_eager_module(function: Function) -> None:
    net = Net(function).eval()
    x = torch.randn(6, 6)
    expected = net(x.clone())
    given = x.clone()
    source = prepare(net, (given,))
    program = build(source, ProgramShape(0, 0, 0), sites=discover(source).select("*"), variant="plain", rank=0)
    env = run(program, flatten_inputs(((given,), {}))[0])
    assert torch.equal(env[program.outputs[0]], expected)
    assert torch.equal(given, x), "the caller's tensor is never written"
    # What was read at a yield point is still the same after everything ran.
    for segment in program.segments:
        names = [spec.name for spec in segment.live]
        kept = {name: run(program, {"in.0": x}, stop=segment.index + 1)[name].clone() for name in names}
        assert all(torch.equal(kept[name], env[name]) for name in names)


def test_a_site_is_the_value_at_its_moment() -> None:
    """``a`` returns h; the activation in place makes another value of it, which is the site ``r``."""
    source = prepare(Net(stale_name).eval(), (torch.randn(6, 6),))
    table = discover(source)
    program = build(source, ProgramShape(0, 0, 0), sites=table.select(["a", "r"]), variant="plain", rank=0)
    x = torch.randn(6, 6)
    env = run(program, {"in.0": x})
    assert bool((env["a"] < 0).any())
    assert torch.equal(env["r"], env["a"].relu())


def strided(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    h.diagonal().zero_()
    return h


def out_argument(m: Any, x: torch.Tensor) -> Any:
    h = m.a(x)
    torch.add(h, 1.0, out=h)
    return h


def own_weight(m: Any, x: torch.Tensor) -> Any:
    m.a.weight.mul_(0.5)
    return m.a(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (strided, "diagonal"),
        (out_argument, "add"),
        (own_weight, "weight"),
    ],
)
def test_a_write_without_a_way_back_is_refused(function: Function, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        discover(prepare(Net(function).eval(), (torch.randn(6, 6),)))


def test_twins_exist_for_in_place_ops_only() -> None:
    assert functional_twin(aten.add_.Tensor) is aten.add.Tensor
    assert functional_twin(aten.masked_fill_.Scalar) is aten.masked_fill.Scalar
    assert functional_twin(aten.copy_.default) is aten.copy.default
    assert functional_twin(aten.add.Tensor) is None
    assert functional_twin(aten.add.out) is None
    assert functional_twin(len) is None
