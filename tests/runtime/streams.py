"""Two models of five layers, compiled so that all their layers stream, and as ever."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import djinn_fx as djinn
from djinn_fx.program import Program
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.streaming import Weights
from tests.backends import compile_model, least

LAYERS, VOCAB, LENGTH = 5, 64, 48
PROMPT = [(7 * i) % 60 + 3 for i in range(21)]
BACKENDS = ("eager", "static")


def deep_model(
    name: str, layers: int, width: int, heads: int, inner: int, spread: float, vocab: int, length: int
) -> Any:
    """A model on the CPU: ``gpt2`` in fp32, or a llama in bf16 whose embeddings are not tied."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shared: Any = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": None, "initializer_range": spread}
        if name == "gpt2":
            gpt2 = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=length, **shared)
            return GPT2LMHeadModel(gpt2).eval()
        llama = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            **shared,
        )
        made: Any = LlamaForCausalLM(llama)
        return made.to(torch.bfloat16).eval()


@cache
def model_of(name: str) -> Any:
    """The session's model of this name."""
    return deep_model(name, LAYERS, width=32, heads=4, inner=48, spread=0.2, vocab=VOCAB, length=LENGTH)


def make(model: Any, backend: str, budget: int | None, **options: Any) -> djinn.Dj:
    sizes = {"max_sessions": 4, "max_length": LENGTH, "prefill_chunk": 16, "edit_rank": 2, "verify": False}
    return compile_model(model, backend, weights_bytes=budget, **(sizes | options))


@cache
def compiled(name: str, backend: str, streams: bool) -> djinn.Dj:
    model = model_of(name)
    return make(model, backend, least(model) if streams else None, sites=("resid_post", "attn_q.1", "mlp_out.2"))


def weights_of(dj: djinn.Dj) -> Weights:
    assert dj._weights is not None
    return dj._weights


def after(run: Run) -> Stop | None:
    """The run's next stop."""
    return next(iter(run), None)


def whole(dj: djinn.Dj, **options: Any) -> Tensor:
    with dj.session() as s:
        logits = s.generate(PROMPT, max_new_tokens=5, output_logits=True, **options).result().logits
    assert logits is not None
    return logits


def feed_of(program: Program) -> Any:
    """What brings a program's weights."""
    assert program.feed is not None
    return program.feed
