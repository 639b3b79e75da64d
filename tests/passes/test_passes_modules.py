"""Plain modules: any inputs and outputs, stops at every submodule, the module's own return type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from djinn_fx.errors import InvalidValue, UnknownSite
from djinn_fx.passes.pipeline import CaptureStore, build, discover
from djinn_fx.passes.source import flatten_inputs, normalise_inputs, prepare
from djinn_fx.program import Program
from djinn_fx.sites import SiteTable
from djinn_fx.specs import ProgramShape
from tests.passes.tiny import run

NO_SHAPE = ProgramShape(0, 0, 0)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL, vocab_size=100))  # type: ignore[arg-type]


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8))  # type: ignore[arg-type]


class Twice(nn.Module):
    """Calls one submodule twice, returns a nested structure with constants in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.flat = nn.Flatten(0)

    def forward(self, x: torch.Tensor, *, times: float = 2.0, extra: torch.Tensor | None = None) -> Any:
        x = self.layers[0](x) * times
        y = self.layers[0](x)
        flat = self.flat(y)
        z = self.layers[1](y) + flat.sum() + (0 if extra is None else extra)
        return {"z": (z, None), "y": [y, "text", 3], "x": x}


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (mlp, lambda: (torch.randn(3, 8),)),
    "bert": (
        bert,
        lambda: {
            "input_ids": torch.arange(14).view(2, 7),
            "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        },
    ),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "nested": (Twice, lambda: (torch.randn(2, 8),)),
    "constants": (Twice, lambda: ((torch.randn(2, 8),), {"times": 3.0, "extra": torch.ones(8)})),
    "lstm": (lambda: nn.LSTM(8, 8, batch_first=True), lambda: (torch.randn(2, 3, 8),)),
}


def prepared(case: str) -> tuple[nn.Module, Any, SiteTable, Program, Any]:
    make, inputs = CASES[case]
    torch.manual_seed(0)
    module, example = make().eval(), inputs()
    source = prepare(module, example)
    table = discover(source)
    program = build(source, NO_SHAPE, sites=list(table.sites), variant="plain", rank=0)
    return module, normalise_inputs(example), table, program, source


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_returns_what_the_module_returns(case: str) -> None:
    module, (args, kwargs), _, program, _ = prepared(case)
    expected = module(*args, **kwargs)
    env = run(program, flatten_inputs((args, kwargs))[0])
    assert program.rebuild is not None
    found = program.rebuild(tuple(env[name] for name in program.outputs))
    assert type(found) is type(expected)
    ours, theirs = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert ours[1] == theirs[1]
    for left, right in zip(ours[0], theirs[0], strict=True):
        if isinstance(right, torch.Tensor):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)
        else:
            assert left == right


def tensor_in(value: Any) -> torch.Tensor | None:
    """The first tensor of what a hook got."""
    if isinstance(value, dict):
        value = next(iter(value.values()))
    found: torch.Tensor | None = value[0] if isinstance(value, tuple) else value
    return found


@pytest.mark.parametrize("case", ["mlp", "bert", "vit", "nested"])
@torch.no_grad()
def test_sites_are_what_hooks_see(case: str) -> None:
    """Every module's output and input, by its path, equals what a forward hook gets."""
    module, (args, kwargs), table, program, _ = prepared(case)
    env = run(program, flatten_inputs((args, kwargs))[0])
    seen: dict[str, Any] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, given: Any, keywords: Any, output: Any) -> None:
            seen.setdefault(path, []).append(output)
            floats = [v for v in (*given, *keywords.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
            seen.setdefault(f"{path}:in", []).append(floats[0] if floats else None)

        return hook

    for path, child in module.named_modules():
        if path:
            child.register_forward_hook(keep(path), with_kwargs=True)
    module(*args, **kwargs)
    checked = 0
    for path, values in seen.items():
        names = [path]
        if len(values) > 1:
            bare, suffix = path.removesuffix(":in"), ":in" * path.endswith(":in")
            names = [f"{bare}#{call + 1}{suffix}" for call in range(len(values))]
            with pytest.raises(UnknownSite, match=f"is called {len(values)} times"):
                table.get(path)
        for name, value in zip(names, values, strict=True):
            value = tensor_in(value)
            if value is not None:
                torch.testing.assert_close(env[table.get(name).name], value, atol=1e-6, rtol=1e-5)
                checked += 1
    assert checked >= 6


@torch.no_grad()
def test_a_view_and_its_base_are_told_apart() -> None:
    """``flat`` is a view of the second call's value; both cross the boundary behind it."""
    _, inputs, table, program, _ = prepared("nested")
    segment = program.segments[program.segment_of("flat")]
    live = {spec.name: spec for spec in segment.live}
    assert live["flat"].alias_of == table.get("layers.0#2").name
    assert live["layers.0#2"].alias_of is None
    assert live["flat"].made_by == "flat"
    assert inputs[1] == {}


@torch.no_grad()
def test_an_input_can_be_a_site() -> None:
    """The first module's input is the program's: the site's value is a copy of it, not itself."""
    _, (args, _), table, program, _ = prepared("mlp")
    assert table.get("0:in").order == 0
    env = run(program, {"in.0": args[0]})
    assert torch.equal(env["0:in"], args[0])
    assert env["0:in"].data_ptr() != args[0].data_ptr()
    env["0:in"].zero_()
    rest = run(program, env, start=1)
    assert torch.equal(rest["0"], run(program, {"in.0": torch.zeros_like(args[0])})["0"])


@torch.no_grad()
def test_another_shape_is_another_program_from_the_same_source() -> None:
    _, _, table, _, source = prepared("mlp")
    store = CaptureStore()
    other = torch.randn(5, 8)
    sites = table.select("*")
    program = build(source, NO_SHAPE, sites=sites, variant="plain", rank=0, example_inputs=(other,), store=store)
    env = run(program, {"in.0": other})
    assert env["1"].shape == (5, 16)
    assert [site.feature_shape for site in program.sites] == [(5, 16), (5, 16), (5, 8)]
    again = build(source, NO_SHAPE, sites=sites, variant="plain", rank=0, example_inputs=(other + 1,), store=store)
    assert len(store.captured) == 1
    assert [s.compile_class for s in again.segments] == [s.compile_class for s in program.segments]


def test_a_plain_module_has_no_tables() -> None:
    _, _, table, _, source = prepared("mlp")
    with pytest.raises(InvalidValue, match="no steering tables"):
        build(source, NO_SHAPE, sites=table.select("*"), variant="armed", rank=0)


def test_sites_of_a_plain_module_have_no_roles() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.logits = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.logits(self.embed(x))
            return y

    table = discover(prepare(Named().eval(), (torch.randn(2, 4),)))
    assert [(site.name, site.role, site.axis) for site in table.sites] == [
        ("embed:in", None, "whole"),
        ("embed", None, "whole"),
        ("logits", None, "whole"),
    ]
    assert table.get("logits:in").name == "embed"
    assert table.get("embed").feature_shape == (2, 4)


class Clashing(nn.Module):
    """Module paths that look like the names of other values."""

    def __init__(self, count: int = 10) -> None:
        super().__init__()
        self.v = nn.ModuleList(nn.Tanh() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = [x.sin()]
        for layer in self.v:
            kept.append(layer(kept[-1]).cos() + kept[0])
        return torch.stack(kept[1:]).sum(0)


@torch.no_grad()
def test_names_of_sites_and_of_other_values_do_not_clash() -> None:
    """A module may be called ``v.12``, which is how an intermediate value with origin 12 would be called."""
    torch.manual_seed(0)
    module, x = Clashing().eval(), torch.randn(2, 8)
    source = prepare(module, (x,))
    sites = discover(source).select([f"v.{index}" for index in range(10)])
    program = build(source, NO_SHAPE, sites=sites, variant="plain", rank=0)
    made = [name for segment in program.segments for name in segment.outputs]
    assert len(made) == len(set(made))
    assert any(name.startswith("v.") and name.endswith("_") for name in made)
    torch.testing.assert_close(run(program, {"in.0": x})[program.outputs[0]], module(x), atol=1e-5, rtol=1e-5)


def test_a_module_without_float_outputs_is_counted_by_its_inputs() -> None:
    class Argmax(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.argmax(-1)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = Argmax()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.pick(x.sin()), self.pick(x.cos())

    table = discover(prepare(Uses().eval(), (torch.randn(2, 3),)))
    assert [site.name for site in table.sites] == ["pick#1:in", "pick#2:in"]
    with pytest.raises(UnknownSite, match="called 2 times"):
        table.get("pick:in")
