"""Models and traces that the tests of inspection look at."""

from __future__ import annotations

from functools import cache
from typing import Any

from djinn_fx import bundled
from djinn_fx.inspecting.making import Choice, Subject, configuration_of, hollow, subject, trace_of
from djinn_fx.passes.trace import Trace


def llama_config(layers: int) -> Any:
    """A tiny llama's configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@cache
def made(name: str) -> Subject:
    """``storyteller``, or ``llama-N`` of N layers."""
    if name == "storyteller":
        config = configuration_of(str(bundled.PATH))
    else:
        config = llama_config(int(name.rpartition("-")[2]))
    return subject(name, hollow(config), Choice())


@cache
def trace(name: str) -> Trace:
    """The trace of its armed decode program."""
    return trace_of(made(name), Choice())
