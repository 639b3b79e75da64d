"""The main promises on a GPU: every site, three dtypes, prompt and decode, bit for bit. Skipped without one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import djinn_fx as djinn
from tests.bits import assert_same_bits

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROMPT = [(7 * i) % 90 + 3 for i in range(21)]
NEW = 6


def make(name: str, dtype: torch.dtype) -> Any:
    """A tiny model on the GPU with weights large enough that edits change what is said."""
    torch.manual_seed(0)
    shared: Any = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.1}
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
    return model.to("cuda", dtype).eval()


@cache
def compiled(name: str, dtype: torch.dtype, batch_invariant: bool = False) -> Any:
    """The compiled model with every role's site, made once."""
    return djinn.compile(
        make(name, dtype),
        sites="*",
        max_length=64,
        max_sessions=4,
        prefill_chunk=16,
        batch_invariant=batch_invariant,
    )


CASES = [(name, dtype) for name in ("gpt2", "llama", "mixtral") for dtype in DTYPES]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_receipt_is_exact(name: str, dtype: torch.dtype) -> None:
    receipt = compiled(name, dtype).receipt
    assert receipt.exact, str(receipt)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_stop_and_resume_at_every_site(name: str, dtype: torch.dtype) -> None:
    dj = compiled(name, dtype)
    with dj.session() as s:
        whole = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True).result()
    with dj.session() as s:
        run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=["*"])
        sites = [stop.site for stop in run]
        assert len(sites) == len(dj.compiled_sites) * (2 + NEW - 1)
        assert torch.equal(run.tokens, whole.tokens)
        assert_same_bits(run.result().logits, whole.logits)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_an_edited_stop_equals_steering_equals_a_hook(name: str, dtype: torch.dtype) -> None:
    dj = compiled(name, dtype)
    site = "resid_post.1"
    short = PROMPT[:12]
    hooked = dj.run_with_hooks(short, fwd_hooks=[(site, lambda value: value * 0.9)])[0]
    with dj.session() as s:
        s.steer(site, scale=0.9)
        assert_same_bits(s.forward(short).result().logits, hooked)
    with dj.session() as s:
        run = s.forward(short, breakpoints=[site])
        for stop in run:
            stop.value.mul_(0.9)
        assert_same_bits(run.result().logits, hooked)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_decode_edits_resume_in_the_batch(name: str, dtype: torch.dtype) -> None:
    # A run that stops every step outlasts its companion; only then must the batch size not matter.
    dj = compiled(name, dtype, batch_invariant=True)
    with dj.session() as a, dj.session() as b:
        a.steer("mlp_out.1", scale=0.5, positions="generated")
        runs = [s.generate(PROMPT, max_new_tokens=NEW, output_logits=True) for s in (a, b)]
        steered, plain = dj.results(runs)
    with dj.session() as a, dj.session() as b:
        point = djinn.break_at("mlp_out.1", positions="generated")
        runs = [
            s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=points)
            for s, points in ((a, [point]), (b, []))
        ]
        for stop in dj.as_stopped(runs):
            stop.value.mul_(0.5)
        assert_same_bits(runs[0].result().logits, steered.logits)
        assert_same_bits(runs[1].result().logits, plain.logits)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_fork_rewind_offload_and_restore(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dj = compiled(name, dtype)
    with dj.session() as s:
        whole = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True).result()
        run = s.run
        run.rewind(position=18, site="attn_out.1")
        assert_same_bits(run.result().logits, whole.logits)
        stop = run.rewind(position=22, site="attn_k.2")
        (fork,) = stop.fork()
        stop.checkpoint().wait().save(tmp_path / "a.safetensors")
        s.offload()
        assert not s.resident
        assert_same_bits(run.result().logits, whole.logits)
        assert_same_bits(fork.run.result().logits, whole.logits)
    with dj.restore(tmp_path / "a.safetensors") as s:
        assert s.run.stop.site == "attn_k.2"
        assert_same_bits(s.run.result().logits, whole.logits)
