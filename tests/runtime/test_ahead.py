"""Steps launched ahead do not outlive the row that they wrote to."""

from __future__ import annotations

import pytest

import djinn_fx as djinn
from tests.runtime.tiny import another_dj, assert_same, generated, prompt

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
