"""Tiny models whose weights are large enough that an edit changes what is said; token 2 ends a text.

They have two layers, or ``DJINN_TEST_LAYERS``.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

VOCAB, WIDTH, LENGTH, CHUNK, ROWS, EOS = 64, 32, 28, 8, 4, 2
LAYERS = int(os.environ.get("DJINN_TEST_LAYERS", "2"))
#: Path of the blocks, whose outputs are ``resid_post``.
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "llama-bf16": "model.layers", "mistral": "model.layers"}


@cache
def family(name: str, device: str = "cpu") -> Any:
    """GPT-2; a Llama with grouped heads, also in bf16; a Mistral with a sliding window of 8."""
    arch, _, dtype = name.partition("-")
    shared: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS, "initializer_range": 0.2}
    grouped: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if arch == "gpt2":
            model: Any = GPT2LMHeadModel(
                GPT2Config(n_layer=LAYERS, n_embd=WIDTH, n_head=4, n_positions=LENGTH, **shared)
            )
        elif arch == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shared, **grouped))
        else:
            model = MistralForCausalLM(MistralConfig(sliding_window=8, **shared, **grouped))
    return model.to(device, torch.bfloat16 if dtype else torch.float32).eval()


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Random numbers of unit variance, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, length: int) -> tuple[int, ...]:
    """Random tokens, none of them the end of a text."""
    return tuple(torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())
