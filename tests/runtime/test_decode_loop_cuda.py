"""The decode loop on a GPU: what only CUDA graphs and launches ahead can get wrong."""

from __future__ import annotations

import pytest

from djinn_fx.runtime.outbox import SLOTS
from tests.runtime.tiny import direction, make_dj, make_model, prompt

pytestmark = pytest.mark.gpu

NEW = 6


@pytest.mark.parametrize("slot", [0, 1, 5])
def test_a_program_that_warms_up_leaves_tokens_alone_that_nobody_read_yet(slot: int) -> None:
    dj = make_dj(make_model("gpt2").cuda(), backend="inductor")
    with dj, dj.session() as session, dj.session() as twin, dj.session() as other:
        expected = twin.generate(prompt(7, 0), max_new_tokens=NEW).result().tokens.tolist()
        run = session.generate(prompt(7, 0), max_new_tokens=NEW, breakpoints=["resid_post.1"])
        stop = next(run)
        while stop.phase == "prompt":
            loop = dj.engine.executor.loop
            assert loop is not None
            loop.retire()
            loop._number = 2 * SLOTS + slot  # the step that is launched next puts its tokens there
            stop = next(run)
        other.steer("resid_post.0", ablate=direction(4))
        other.generate(prompt(5, 1), max_new_tokens=3).result()
        assert run.result().tokens.tolist() == expected
