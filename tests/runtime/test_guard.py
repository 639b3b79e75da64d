"""Weights that were moved or replaced are seen before anything runs, whoever moved them and however."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import djinn_fx as djinn
from tests.runtime.mistakes import begin
from tests.runtime.tiny import another_dj, make_dj, make_model


def test_moved_and_replaced_parameters_are_refused() -> None:
    model = make_model("llama")
    dj = make_dj(model)
    head, kept = model.lm_head, model.lm_head.weight
    before = dj([3, 4]).logits
    for change in (
        lambda: setattr(head, "weight", torch.nn.Parameter(kept.detach().clone())),
        lambda: head.register_buffer("extra", torch.zeros(1)),
        lambda: head.double(),
        lambda: setattr(kept, "data", kept.data.t()),
        lambda: head.__dict__.update(_parameters={**head._parameters, "weight": torch.nn.Parameter(kept.detach() * 2)}),
    ):
        storage = kept.data
        with dj.session() as s, dj.session() as free:
            run, fresh = begin(s, "resid_post.0"), free.generate([3], max_new_tokens=1)
            change()
            for act in (lambda: dj([3]), lambda: dj.session(), fresh.result, fresh.result):
                with pytest.raises(djinn.CaptureError, match=r"lm_head.* was moved or replaced.*djinn.compile again"):
                    act()
            head.weight, kept.data = kept, storage
            head._buffers.clear()
            assert run.result().finish_reason == fresh.result().finish_reason == "length"
    assert torch.equal(dj([3, 4]).logits, before)


def test_an_equal_tensor_in_the_place_of_another_is_refused() -> None:
    model = make_model("llama")
    head = model.lm_head
    head.register_buffer("extra", torch.ones(1), persistent=False)
    with make_dj(model) as dj:
        dj([3, 4])
        head.extra = torch.ones(1)  # of one element, so that the two say that they are equal
        with pytest.raises(djinn.CaptureError, match=r"lm_head.extra' was moved or replaced"):
            dj([3, 4])


def test_runs_begun_together_look_at_the_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with another_dj("llama") as dj:
        sessions, guard = [dj.session() for _ in range(3)], mock.Mock(wraps=dj.engine.guard)
        monkeypatch.setattr(dj.engine, "guard", guard)
        runs = [session.generate([3, 4], max_new_tokens=3) for session in sessions]
        guard.assert_not_called()
        dj.results(runs)
        guard.assert_called_once()
