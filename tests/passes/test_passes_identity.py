"""Keys of captured graphs: equal for equal models, another one for whatever an export depends on."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType, ModuleType
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.integrations import flex_attention
from transformers.models.llama import modeling_llama

from djinn_fx.passes import identity
from djinn_fx.passes.describe import MOST_ELEMENTS
from djinn_fx.passes.identity import export_key
from djinn_fx.passes.source import prepare
from djinn_fx.specs import ProgramShape
from tests.passes.tiny import Machine, tiny_model

SHAPE = ProgramShape(1, 4, 4)
FACTOR = 2.0
CURSOR = iter(())


def arenas(positions: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(2, 2, positions, 16), torch.zeros(2, 2, positions, 16))] * 2


def key_of(model: Any, shape: ProgramShape = SHAPE, positions: int = 4) -> str | None:
    return export_key(prepare(model), shape, arenas(positions))


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any) -> Any:
    return q * FACTOR, k


def set_eps(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def set_config(model: Any) -> None:
    model.config.attention_dropout = 0.5


def set_forward(model: Any) -> None:
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: forward(x) * 2


def set_bound_forward(model: Any) -> None:
    model.model.norm.forward = MethodType(lambda self, x: x * self.variance_epsilon, model.model.norm)


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def widen(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(300, 64))


def stride(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 256).T)


def swap_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU().eval()


def add_constant(model: Any) -> None:
    model.model.offset = torch.ones(3)


CHANGES: list[Callable[[Any], None]] = [
    *(set_eps, set_config, set_forward, set_bound_forward, tie, widen, stride, swap_activation, add_constant),
    lambda model: model.bfloat16(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_key(model: Any, change: Callable[[Any], None]) -> None:
    before = key_of(model)
    assert before is not None
    change(model)
    after = key_of(model)
    assert after is not None
    assert after != before


def test_an_equal_model_has_the_same_key(model: Any) -> None:
    """Whatever its weights are, whatever it and others did meanwhile."""
    before = key_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model(torch.tensor([[3, 4]]))
    Machine(model).build((1, 2, 1))
    Machine(tiny_model("gpt2"))
    model.generation_config.temperature = 0.5
    assert before == key_of(model) == key_of(tiny_model("llama"))


def use_inductor(model: Any) -> None:
    torch.compile(lambda x: x.cos() + 1)(torch.zeros(3))


def compile_it(model: Any) -> None:
    model.compile(backend="eager")
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))


def use_flex_attention(model: Any) -> None:
    """Its only instance is made when a model first uses it, and kept in its class."""
    assert flex_attention.WrappedFlexAttention(False)


def register_attention(model: Any) -> None:
    AttentionInterface.register("djinn_test_attention", lambda *args: CURSOR)


def build_others(model: Any) -> None:
    for name in ("gemma3", "mixtral", "opt"):
        tiny_model(name)


def load_submodules(model: Any) -> None:
    for name in ("AutoTokenizer", "BertModel", "Trainer", "pipeline"):
        assert getattr(transformers, name)


def load_without_initialising(model: Any) -> None:
    """Transformers keeps something in classes when it first makes a model; unpickling one does not."""
    del cast(Any, nn.Module).smart_apply
    for name in [name for name in vars(type(model)) if name.endswith("_implementation_cached_value")]:
        delattr(type(model), name)


USES = [use_inductor, compile_it, use_flex_attention, register_attention, build_others, load_submodules]


@pytest.mark.parametrize("use", [*USES, load_without_initialising])
def test_what_a_process_did_is_not_in_the_key(model: Any, use: Callable[[Any], None]) -> None:
    before = key_of(model)
    assert before is not None
    kept = dict(AttentionInterface._global_mapping)
    try:
        use(model)
        assert key_of(model) == before
    finally:
        AttentionInterface._global_mapping.clear()
        AttentionInterface._global_mapping.update(kept)
    assert key_of(tiny_model("llama")) == before


@pytest.mark.slow
def test_another_process_has_the_same_key(model: Any) -> None:
    """One that did nothing but build the model, whatever this one did: it has used Inductor at least."""
    use_inductor(model)
    use_flex_attention(model)
    code = "from tests.passes.test_passes_identity import *; print(key_of(tiny_model('llama')))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [key_of(model)]


def test_shape_and_arenas_are_in_the_key(model: Any) -> None:
    keys = [
        key_of(model),
        key_of(model, ProgramShape(2, 4, 4)),
        key_of(model, ProgramShape(1, 5, 4)),
        key_of(model, positions=5),
    ]
    assert len(set(keys)) == 4
    assert key_of(model, ProgramShape(1, 4, 1)) == keys[0], "what is kept is decided after the capture"


def test_patched_code_changes_the_key(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper of the model's module, a class's forward, torch itself; a global that the patch reads."""
    keys = [key_of(model)]
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary)
        keys.append(key_of(model))
        patch.setitem(globals(), "FACTOR", 3.0)
        keys.append(key_of(model))
    assert key_of(model) == keys[0]
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: x)
        keys.append(key_of(model))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
        keys.append(key_of(model))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "silu", lambda x, inplace=False: x)
        keys.append(key_of(model))
    assert None not in keys
    assert len(set(keys)) == len(keys)


class Scaling:
    """A thing that is called in place of an op."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        return x * self.factor


REPLACED: list[tuple[Any, str, Any]] = [
    *((torch, "rsqrt", torch.sqrt), (torch, "mul", torch.add), (torch, "mul", partial(torch.add, alpha=2))),
    *((torch, "mul", partial(torch.add, alpha=3)), (torch, "mul", Scaling(2.0)), (torch, "mul", Scaling(3.0))),
    *(
        (torch.nn.functional, "gelu", torch.tanh),
        (torch._C._nn, "gelu", torch.tanh),
        (torch.special, "erf", torch.tanh),
    ),
    *((torch.Tensor, "mul", torch.Tensor.add), (torch.Tensor, "pow", property(lambda self: self.mul))),
    *((nn.Linear, "forward", staticmethod(torch.tanh)), (nn.Linear, "forward", Scaling(2.0))),
    *((nn.Linear, "forward", Scaling(3.0)), (modeling_llama.LlamaMLP, "forward", Scaling(2.0))),
    *((modeling_llama.LlamaMLP, "forward", Scaling(3.0)), (modeling_llama, "rotate_half", torch.tanh)),
    *((modeling_llama, "rotate_half", Scaling(2.0)), (modeling_llama, "rotate_half", Scaling(3.0))),
]


def test_replaced_builtins_change_the_key(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the namespaces of torch and in classes, by builtins, partial functions and objects."""
    source = prepare(model)
    before = export_key(source, SHAPE, arenas())
    keys = [before]
    for where, name, value in REPLACED:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value, raising=False)
            keys.append(export_key(source, SHAPE, arenas()))
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert export_key(source, SHAPE, arenas()) == before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mul", operator.attrgetter("add"))
        assert export_key(source, SHAPE, arenas()) is None


def test_what_a_patch_reads_through_a_module_is_in_the_key(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a class and on one instance; what reads the environment has none."""
    consts: Any = ModuleType("consts")
    consts.SCALE = 1.0

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, consts.SCALE)

    def reading(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * float(os.environ.get("SCALE", "1"))

    for where in (modeling_llama.LlamaRMSNorm, model.model.norm):
        with monkeypatch.context() as patch:
            patch.setattr(where, "forward", forward if isinstance(where, type) else MethodType(forward, where))
            keys = [key_of(model)]
            patch.setattr(consts, "SCALE", 2.0)
            keys.append(key_of(model))
            assert None not in keys
            assert len(set(keys)) == 2
            patch.setattr(where, "forward", reading if isinstance(where, type) else MethodType(reading, where))
            assert key_of(model) is None
    assert key_of(model) is not None


def test_versions_sources_and_settings_are_in_the_key(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key_of(model)]
    for where, name, value in (
        (torch, "__version__", "2.99"),
        (identity, "__version__", "99"),
        (identity, "_SOURCES", identity._SOURCES[1:]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            keys.append(key_of(model))
    torch.set_default_dtype(torch.float64)
    try:
        keys.append(key_of(model))
    finally:
        torch.set_default_dtype(torch.float32)
    assert None not in keys
    assert len(set(keys)) == len(keys)
    names = {path.name for path in identity._SOURCES}
    assert {"capture.py", "annotate.py", "roles.py", "codec.py", "signatures.py", "program.py"} <= names
    assert all(path.is_file() for path in identity._SOURCES)


def test_what_no_key_can_tell_has_none(model: Any) -> None:
    model.model.cursor = iter([1, 2])
    assert key_of(model) is None
    model.model.cursor = None
    model.model.table = torch.zeros(MOST_ELEMENTS + 1)
    assert key_of(model) is None
    model.model.table = [torch.zeros(1)]
    assert key_of(model) is None, "a copy on disk would not follow changes of it"
    model.model.table = [nn.Linear(2, 2)]
    assert key_of(model) is None
    model.model.table = [model.lm_head]
    assert key_of(model) is not None
    source = prepare(model)
    assert export_key(source, SHAPE, arenas()) is not None
    with torch.device("cpu"):
        assert export_key(source, SHAPE, arenas()) is None, "a mode sees the ops of a trace"
    source.clone.get_submodule("lm_head").register_forward_hook(lambda module, args, output: None)
    assert export_key(source, SHAPE, arenas()) is None


def test_plain_modules_are_not_kept() -> None:
    assert export_key(prepare(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),)), SHAPE, ()) is None
