"""The models and runs of ``test_cuda.py``: three architectures in three dtypes, each compiled as seldom as possible.

All compiled models of one architecture and dtype share exports and compilations.
``DJINN_TEST_DEVICE=cpu DJINN_TEST_BACKEND=static`` runs the same tests without a GPU, uncompiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import djinn_fx as djinn
from djinn_fx.passes.inductor import InductorLowering
from djinn_fx.passes.pipeline import CaptureStore
from djinn_fx.runtime.results import Result
from tests import backends
from tests.bits import assert_same_bits

DEVICE = os.environ.get("DJINN_TEST_DEVICE", "cuda")
BACKEND = backends.BACKEND or "inductor"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VOCAB = 96

#: Sites of the kind ``few``: what predicates, edits along directions and complete receipts need.
FEW = ("resid_post", "attn_q.1", "mlp_out.1", "logits")

#: Options by kind. ``every``: all sites, the bucket follows the batch; ``together``: all sites, always one bucket.
KINDS: dict[str, dict[str, Any]] = {
    "every": {"sites": "*", "edit_rank": 1},
    "together": {"sites": "*", "edit_rank": 1, "batch_invariant": True},
    "few": {"sites": FEW, "edit_rank": 2, "batch_invariant": True},
    "eager": {"sites": "resid_post.1", "edit_rank": 1, "backend": "eager"},
}


@cache
def model_of(name: str, dtype: str) -> Any:
    """A tiny model with weights large enough that edits change what is said."""
    torch.manual_seed(0)
    shared: Any = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.1}
    wide: Any = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **shared,
    }
    if name == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=128, n_head=2, n_positions=64, **shared))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**wide))
    else:
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, sliding_window=None, **wide))
    return model.to(DEVICE, DTYPES[dtype]).eval()


@cache
def captures_of(name: str, dtype: str) -> CaptureStore:
    """What was exported of a model."""
    return CaptureStore()


@cache
def lowering_of(name: str, dtype: str) -> InductorLowering:
    """What was compiled of a model."""
    return InductorLowering()


@cache
def compiled(name: str, dtype: str, kind: str) -> djinn.Dj:
    """A compiled model, made once."""
    sizes: dict[str, Any] = {"max_length": 64, "max_sessions": 4, "prefill_chunk": 16}
    with _shared(name, dtype):
        return backends.compile_model(model_of(name, dtype), **({"backend": BACKEND} | sizes | KINDS[kind]))


@contextmanager
def _shared(name: str, dtype: str) -> Iterator[None]:
    with mock.patch("djinn_fx.dj.CaptureStore", lambda: captures_of(name, dtype)):
        if BACKEND != "inductor":
            yield
            return
        with mock.patch("djinn_fx.dj.InductorLowering", lambda: lowering_of(name, dtype)):
            yield


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(3, VOCAB, (length,), generator=generator)]


def direction(seed: int, *shape: int) -> Tensor:
    """Random fp32 numbers on the host."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROMPT = [(7 * i) % 90 + 3 for i in range(21)]
NEW = 6
#: Prompts that take one or two chunks, so sessions come to decode one after the other; more than there are rows.
TEXTS = [PROMPT, prompt(3, 1), prompt(30, 2), prompt(9, 3), prompt(17, 4), prompt(1, 5)]


def generated(dj: djinn.Dj, ids: list[int] = PROMPT, new: int = NEW, **options: Any) -> Result:
    """An uninterrupted run on a session of its own, with logits."""
    with dj.session() as s:
        return s.generate(ids, max_new_tokens=new, output_logits=True, **options).result()


def assert_same(one: Result, other: Result, what: str = "") -> None:
    """Equal tokens and equal bits of the logits."""
    assert one.tokens.tolist() == other.tokens.tolist(), what
    assert_same_bits(one.logits, other.logits, what)


class Largest:
    """A predicate of the user's own."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, h: Tensor) -> Tensor:
        return h.amax() > self.limit


def between(numbers: Tensor) -> float:
    """A limit that about half of the numbers exceed, far from all of them."""
    found = numbers.flatten().sort().values
    third = len(found) // 3
    gaps = found[third + 1 : len(found) - third + 1] - found[third : len(found) - third]
    index = third + int(gaps.argmax())
    return float(found[index] + found[index + 1]) / 2


def places(when: Callable[[Tensor], Tensor], site: str, seen: list[Any]) -> list[tuple[str, tuple[int, ...]]]:
    """The stops that a breakpoint with this predicate makes, among all that its site has."""
    found = []
    for at, positions, value, tokens in seen:
        if at != site:
            continue
        rows = torch.tensor(tokens)[list(positions)] if getattr(when, "reads_token", False) else value
        fired = tuple(position for position, row in zip(positions, rows, strict=True) if bool(when(row)))
        if fired:
            found.append((site, fired))
    return found
