"""``check`` says in a moment what compile would refuse, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from djinn_fx.errors import CaptureError
from djinn_fx.passes.source import prepare
from djinn_fx.passes.support import check
from djinn_fx.specs import Support
from tests.passes.tiny import BASE, GPT2, tiny_model


def lm(kind: str, **extra: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**BASE, **extra})
    return AutoModelForCausalLM.from_config(config).eval()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptj", {**GPT2, "rotary_dim": 8}, "attention interface"),
    ("codegen", {**GPT2, "rotary_dim": 8}, "attention interface"),
    ("falcon", {}, "of its own"),
    ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "ALiBi"),
    ("bloom", {"n_layer": 2, "n_head": 4}, "ALiBi"),
    ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}, "mask"),
    ("mamba", {}, "linear_attention"),
    ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
    ("recurrent_gemma", {}, "recurrent state"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            },
        },
        "longrope",
    ),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("kind", "extra", "words"), REFUSED, ids=[kind for kind, _, _ in REFUSED])
def test_architectures_that_would_decode_wrongly(kind: str, extra: dict[str, Any], words: str) -> None:
    model = lm(kind, **extra)
    start = time.perf_counter()
    support = check(model)
    assert time.perf_counter() - start < 5
    assert not support.ok
    assert any(words in reason for reason in support.reasons)
    with pytest.raises(CaptureError, match=words):
        prepare(model)


def in_training(model: nn.Module) -> None:
    model.train()


def one_part_in_training(model: Any) -> None:
    model.transformer.h[1].mlp.train()


def hooked(model: Any) -> None:
    model.transformer.h[0].register_forward_hook(lambda *args: None)


def dispatched(model: Any) -> None:
    model.transformer.h[0]._hf_hook = object()


def on_meta(model: Any) -> None:
    model.to("meta")


def on_two_devices(model: Any) -> None:
    model.lm_head.to("meta")
    model.transformer.ln_f.to("meta")


def quantised(model: Any) -> None:
    model.is_quantized = True


def in_integers(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc.weight = nn.Parameter(torch.zeros(64, 256, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_training, "training mode"),
        (one_part_in_training, r"transformer\.h\.1\.mlp is in training mode"),
        (hooked, r"transformer\.h\.0 has hooks"),
        (dispatched, "hooks"),
        (on_meta, "meta"),
        (on_two_devices, "meta"),
        (quantised, "quantised"),
        (in_integers, "int8"),
    ],
)
def test_states_of_a_model_that_cannot_be_captured(change: Callable[[Any], None], words: str) -> None:
    model = tiny_model("gpt2")
    assert check(model) == Support(True)
    change(model)
    with pytest.raises(CaptureError, match=words):
        prepare(model)
    assert not check(model).ok


def test_modules_that_are_not_language_models() -> None:
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    for module in (nn.Linear(2, 2).eval(), bert.eval()):
        support = check(module)
        assert not support.ok
        assert "example_inputs" in support.reasons[0]
        assert check(module, (torch.zeros(1, 2),)).ok
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16, vocab_size=9))
    assert "encoder-decoder" in check(t5.eval()).reasons[0]
    assert not check("gpt2").ok  # type: ignore[arg-type]
    compiled: Any = torch.compile(nn.Linear(2, 2).eval())
    assert "_orig_mod" in check(compiled, (torch.zeros(1, 2),)).reasons[0]


def test_an_unknown_architecture_is_tried_and_verified() -> None:
    model = tiny_model("llama")
    model.config.model_type = "llama_of_tomorrow"
    support = check(model)
    assert support.ok
    assert "not among the tested architectures" in support.reasons[0]
    assert prepare(model).reasons == support.reasons


def test_every_reason_is_given_at_once() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].register_forward_hook(lambda *args: None)
    assert len(check(model).reasons) == 2
