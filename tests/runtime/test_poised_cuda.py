"""Steps that run on from their stops on a GPU, by graphs and letters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import djinn_fx as djinn
from tests.runtime.poised_cases import ACTS, Act, check, steered

pytestmark = pytest.mark.gpu

LAYERS = 3


@cache
def compiled(name: str) -> djinn.Dj:
    """Wide enough for the matrix kernels that take the edits along."""
    torch.manual_seed(0)
    model: Any
    if name == "gpt2":
        model, dtype = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_positions=128, vocab_size=512)), torch.bfloat16
    else:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2}
        config = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=512, max_position_embeddings=128, **sizes)  # type: ignore[arg-type]
        model, dtype = LlamaForCausalLM(config), torch.float16
    return djinn.compile(
        model.to("cuda", dtype).eval(), sites="resid_post", max_sessions=4, max_length=64, verify=False
    )


@pytest.fixture(params=["gpt2", "llama"])
def dj(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    made = compiled(request.param)
    yield made
    for session in list(made.engine.sessions):
        session.close()


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_the_bits_of_whole_steps(dj: djinn.Dj, act: Act) -> None:
    ways, posts = check(dj, act)
    assert act is steered or (True in ways and True in posts)


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_the_bits_of_whole_steps_where_some_parts_are_not_ready(dj: djinn.Dj, act: Act) -> None:
    check(dj, act, lambda number: number * 5 % 7 < 4)
