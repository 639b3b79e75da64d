"""Two tiny models in two dtypes, compiled once per test session, and the runs that tests compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import djinn_fx as djinn
from djinn_fx.passes.pipeline import CaptureStore
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from tests.backends import compile_model
from tests.bits import assert_same_bits

NAMES = ("gpt2", "llama", "gpt2-bf16", "llama-bf16")
VOCAB, WIDTH, LENGTH, CHUNK, ROWS = 64, 32, 64, 16, 4
#: The usual run: two chunks of a prompt, then tokens; it forwards the positions 0 to 22.
PROMPT, NEW = 20, 4
#: What most tests need: two ends of the stream, one site with heads, one inside the last block.
SITES = ("resid_post", "attn_q.0", "mlp_out.1")
#: Sites with a module's own path, beside all that have a role.
PATHS = {
    "gpt2": ("transformer.h.0.ln_1", "transformer.h.1.attn.c_attn", "transformer.h.1.mlp.c_fc"),
    "llama": ("model.layers.0.input_layernorm", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


def make_model(name: str, positions: int = LENGTH) -> Any:
    """A fresh model; weights large enough that an edit changes what is said, no EOS."""
    arch, _, dtype = name.partition("-")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shared: Any = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.2}
        if arch == "gpt2":
            gpt2 = GPT2Config(n_layer=2, n_embd=WIDTH, n_head=4, n_positions=positions, **shared)
            model: Any = GPT2LMHeadModel(gpt2)
        else:
            llama = LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
                **shared,
            )
            model = LlamaForCausalLM(llama)
    return model.to(torch.bfloat16 if dtype else torch.float32).eval()


@cache
def model_of(name: str) -> Any:
    """The session's model of this name; whoever changes it changes it back."""
    return make_model(name)


@cache
def captures_of(name: str) -> CaptureStore:
    """What was exported of one of the session's models: most of a compilation's time, so all share it."""
    return CaptureStore()


def another_dj(name: str, sites: Any = SITES, **options: Any) -> djinn.Dj:
    """Compile one of the session's models once more."""
    with mock.patch("djinn_fx.dj.CaptureStore", lambda: captures_of(name)):
        return make_dj(model_of(name), sites, **options)


def make_dj(model: Any, sites: Any = SITES, **options: Any) -> djinn.Dj:
    """Compile with the tests' sizes, unverified: the receipt has tests of its own."""
    sizes = {"max_length": LENGTH, "max_sessions": ROWS, "prefill_chunk": CHUNK, "edit_rank": 3, "verify": False}
    return compile_model(model, sites=sites, **(sizes | options))


@cache
def compiled(name: str, kind: str = "main") -> djinn.Dj:
    """The session's compiled model: ``main`` (SITES), ``every`` (all sites), ``invariant`` (``batch_invariant``)."""
    if kind == "every":
        return another_dj(name, ("*", *PATHS[name.partition("-")[0]]), edit_rank=1)
    return another_dj(name, batch_invariant=kind == "invariant")


#: For a fixture of all models: two of them, one in each dtype.
TWO = pytest.mark.parametrize("dj", ["gpt2", "llama-bf16"], indirect=True)


def guarded(dj: djinn.Dj) -> Iterator[djinn.Dj]:
    """Hand out a shared compiled model; afterwards every row must be free, and zero."""
    yield dj
    left = list(dj.engine.sessions)
    for session in left:
        session.close()
    assert not left, f"sessions left open: {left}"
    assert dj.engine.arena.free_rows == dj.engine.options.max_sessions
    assert not any(bool(tensor[:-1].any()) for pair in dj.engine.arena.layers for tensor in pair), "a row is not zero"


def prompt(length: int, seed: int = 0) -> Tensor:
    """Random tokens ``[length]``."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def direction(seed: int, *shape: int) -> Tensor:
    """Random fp32 numbers, of a residual's width unless said otherwise."""
    return torch.randn(*(shape or (WIDTH,)), generator=torch.Generator().manual_seed(seed))


def generated(dj: djinn.Dj, ids: Tensor, new: int = NEW, **options: Any) -> Result:
    """An uninterrupted run on a session of its own, with logits."""
    with dj.session() as session:
        return session.generate(ids, max_new_tokens=new, output_logits=True, **options).result()


def logits_of(session: Session, ids: Tensor | None = None, **options: Any) -> Tensor:
    """Logits ``[T, vocab]`` of a forward call."""
    logits = session.forward(ids, **options).result().logits
    assert logits is not None
    return logits


def assert_same(a: Result, b: Result, what: str = "") -> None:
    """Equal tokens and equal bits of the logits."""
    assert a.tokens.tolist() == b.tokens.tolist(), what
    assert_same_bits(a.logits, b.logits, what)


def values(stops: Any) -> dict[tuple[int, str], Tensor]:
    """Copies of what stops show, by position and site."""
    return {(stop.position, stop.site): stop.value.clone() for stop in stops}


def some(stop: Stop | None) -> Stop:
    """A stop that must be there."""
    assert stop is not None
    return stop


def bits_of(result: Result) -> Tensor:
    """The logits that must be there."""
    assert result.logits is not None
    return result.logits


def steered(dj: djinn.Dj, *edits: djinn.Edit) -> Result:
    """The usual run under these edits."""
    with dj.session() as s:
        for edit in edits:
            s.steer(edit)
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True)
        return run.result()


def edited(dj: djinn.Dj, site: str, positions: Iterable[int], change: Callable[[Any], Any]) -> Result:
    """The usual run with the value of ``site`` changed by hand, at the stops."""
    with dj.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[site])
        for stop in run:
            for row, position in enumerate(stop.positions):
                if position in positions:
                    stop.value[row] = change(stop.value[row])
        return run.result()
