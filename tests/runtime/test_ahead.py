"""Steps launched ahead do not outlive the row that they wrote to."""

from __future__ import annotations

import pytest

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from tests.backends import least
from tests.runtime.tiny import another_dj, assert_same, generated, make_dj, make_model, prompt

NEW = 6
POINT = djinn.break_at("resid_post.0", when=djinn.when.norm_above(0.0), positions="generated")


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_offloaded_at_a_stop(backend: str) -> None:
    dj = another_dj("llama", backend=backend)
    whole = generated(dj, prompt(9), NEW)
    with dj.session() as s:
        run = s.generate(prompt(9), max_new_tokens=NEW, output_logits=True, breakpoints=[POINT])
        next(run)
        s.offload()
        assert_same(run.result(), whole)
    dj.close()


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_offloaded_while_another_stops(backend: str) -> None:
    dj = another_dj("llama", backend=backend, batch_invariant=True)
    whole = generated(dj, prompt(9), NEW)
    with dj.session() as s, dj.session() as other:
        run = s.generate(prompt(9), max_new_tokens=NEW, output_logits=True)
        beside = other.generate(prompt(7), max_new_tokens=NEW, breakpoints=[POINT])
        for count, _ in enumerate(dj.as_stopped([run, beside])):
            if count == 2:
                s.offload()
        assert_same(run.result(), whole)
    dj.close()


@pytest.mark.parametrize("edited", [False, True], ids=["looked at", "edited"])
def test_weights_are_reloaded_at_a_stop(edited: bool) -> None:
    """The step after it runs under the weights as they are, and so does what runs again of the one in the air."""
    found: list[Result] = []
    for backend in ("static", "eager"):
        model = make_model("gpt2")
        with make_dj(model, backend=backend, weights_bytes=least(model)) as dj, dj.session() as s:
            run = s.generate(prompt(7), max_new_tokens=NEW, output_logits=True, breakpoints=[POINT])
            stop = next(run)
            if edited:
                stop.value.mul_(2)
            model.get_input_embeddings().weight.data.neg_()
            dj.reload_weights()
            found.append(run.result())
    assert_same(found[0], found[1])
