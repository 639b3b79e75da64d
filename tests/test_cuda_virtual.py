"""Layers that stream to a GPU: the same bits as with everything there, through graphs, stops and batches.

``DJINN_TEST_DEVICE=cpu DJINN_TEST_BACKEND=static`` runs the same tests without a GPU, uncompiled.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from tests.backends import compile_model, least
from tests.cuda_models import BACKEND, DEVICE, NEW, PROMPT, TEXTS, assert_same, generated
from tests.runtime.streams import deep_model

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

LAYERS, VOCAB = 7, 96


@cache
def model_of(name: str) -> Any:
    """A model on the CPU; layers large enough that a copy takes longer than a launch."""
    return deep_model(name, LAYERS, width=512, heads=8, inner=1024, spread=0.05, vocab=VOCAB, length=64)


@cache
def compiled(name: str, kind: str) -> djinn.Dj:
    """``resident``: everything on the device; ``least``: all layers stream; ``half``: about half of them."""
    model = model_of(name)
    lowest, whole = least(model), sum(p.nbytes for p in model.parameters())
    budget = {"resident": None, "least": lowest, "half": (lowest + whole) // 2}[kind]
    sizes: dict[str, Any] = {"max_length": 64, "max_sessions": 4, "prefill_chunk": 16, "edit_rank": 1}
    return compile_model(model, BACKEND, device=DEVICE, weights_bytes=budget, **sizes)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["least", "half"])
class TestStreaming:
    """Against everything resident."""

    def test_uninterrupted_and_stopped_everywhere(self, name: str, kind: str) -> None:
        dj, right = compiled(name, kind), generated(compiled(name, "resident"))
        assert dj.receipt is not None and dj.receipt.exact
        for _ in range(3):
            assert_same(generated(dj), right)
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=dj.compiled_sites)
            assert len(list(run)) == LAYERS * (2 + NEW - 1)
            assert_same(run.result(), right)

    def test_edits_forks_and_a_batch(self, name: str, kind: str) -> None:
        found = []
        for dj in (compiled(name, kind), compiled(name, "resident")):
            results = dj.generate(TEXTS, max_new_tokens=NEW, output_logits=True)
            with dj.session() as s:
                run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.3"])
                for stop in run:
                    stop.value.mul_(-0.5)
                results.append(run.result())
            with dj.session() as s:
                run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.5"])
                twin = next(iter(run)).fork(1)[0]
                twin.value.zero_()
                results += [twin.run.result(), run.result()]
                twin.session.close()
            found.append(results)
        for one, other in zip(*found, strict=True):
            assert_same(one, other)

    def test_other_calls_and_other_streams_between_steps(self, name: str, kind: str) -> None:
        dj, right = compiled(name, kind), generated(compiled(name, "resident"))
        whole = compiled(name, "resident")(PROMPT).logits
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.1"])
            for _ in run:
                if DEVICE == "cuda":
                    with torch.cuda.stream(torch.cuda.Stream()):
                        logits = dj(PROMPT).logits
                    torch.cuda.synchronize()
                else:
                    logits = dj(PROMPT).logits
                assert torch.equal(logits, whole)
            assert_same(run.result(), right)

    def test_a_checkpoint_goes_on_resident(self, name: str, kind: str, tmp_path: Path) -> None:
        dj, other = compiled(name, kind), compiled(name, "resident")
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.4"])
            for _ in zip(range(4), run, strict=False):
                pass
            s.checkpoint().save(tmp_path / "it")
        with other.restore(tmp_path / "it") as again:
            assert again.run is not None
            assert_same(again.run.result(), generated(other))

    def test_changes_in_place(self, name: str, kind: str) -> None:
        dj, other = compiled(name, kind), compiled(name, "resident")
        before = generated(dj)
        weight = next(p for n, p in model_of(name).named_parameters() if ".3." in n and p.dim() > 1)
        with torch.no_grad():
            weight.neg_()
        changed = generated(dj)
        assert_same(changed, generated(other))
        with torch.no_grad():
            weight.neg_()
        assert_same(generated(dj), before)
        assert not torch.equal(changed.logits, before.logits)  # type: ignore[arg-type]

    def test_memory(self, name: str, kind: str) -> None:
        found = compiled(name, kind).memory()
        whole = compiled(name, "resident").memory()
        assert found["weights"] < whole["weights"] and found["weights_streamed"] > 0 == whole["weights_streamed"]
