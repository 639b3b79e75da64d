"""Doubts: a value that was written is an edit if a bit of it differs, whenever that is found out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.doubt import Doubts, Question
from tests.runtime.checkpoint_cases import assert_same, close_all, finish, shared, start

SITE = "resid_post.0"


@pytest.mark.prompt_answers
def test_on_a_cpu_the_answer_is_there_at_once() -> None:
    doubts, before = Doubts(torch.device("cpu")), torch.tensor([1.0, float("nan"), 0.0])
    same, other = doubts.raised(before.clone(), before), doubts.raised(torch.tensor([1.0, float("nan"), -0.0]), before)
    assert (same.known, other.known) == (False, True)
    assert other.own[1].isnan() and other.holds() and not same.holds()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_it_is_told_later(dtype: torch.dtype) -> None:
    doubts = Doubts(torch.device("cuda"))
    before = torch.randn(3, 33, device="cuda").to(dtype)
    for round in range(3):  # slots are used again
        changed = before.clone()
        changed[2, 32] = -changed[2, 32]
        asked = [doubts.raised(value, before) for value in (before.clone(), changed, before.t().contiguous().t())]
        assert [doubt.known for doubt in asked] == [None] * 3, round
        assert [doubt.holds() for doubt in asked] == [False, True, False]
        assert torch.equal(asked[1].own, changed) and asked[1].own.data_ptr() != changed.data_ptr()
        assert asked[2].own.is_contiguous()


def test_a_question_is_asked_again_once_nobody_waits_for_it_and_the_device_is_through() -> None:
    doubts = Doubts(torch.device("cpu"))
    first, second = doubts.question(), doubts.question()
    first.word.fill_(1)
    first._open = True  # as on CUDA, where an event would say when it is over
    dropped, asked = (doubts.about(torch.zeros(1), question) for question in (first, second))
    assert not asked.holds() and not asked.holds()
    del dropped
    assert list(doubts._free) == [second, first]
    assert doubts.question() is second
    assert doubts.question() not in (first, second), "the device may still write its answer"
    first._open = False
    again = doubts.question()
    assert again is first and not doubts.about(torch.zeros(1), again).holds()


def test_a_comparison_that_was_interrupted_answers_no_later_question() -> None:
    """It is enqueued, and nothing says when it is over: the device may write its answer whenever."""
    doubts, value = Doubts(torch.device("cpu")), torch.ones(3)
    verdict, copy = doubts.carried(value, torch.zeros(3))
    (question,) = doubts._made
    with mock.patch.object(Question, "asked", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        copy(torch.empty(3))
    del verdict, copy
    assert doubts.question() is not question


@pytest.mark.parametrize("at", ["prompt", "generated"])
def test_what_turns_out_to_be_no_edit_is_none(at: str) -> None:
    dj = shared("gpt2")
    with dj.session(seed=4) as s:
        expected = finish(start(s, []))
    with dj.session(seed=4) as s:
        run = start(s, [djinn.break_at(SITE, positions=at), djinn.break_at("resid_post.1", positions=at)])
        for stop in run:
            stop.value.mul_(-1).mul_(-1)
            before = stop.value.clone()
            stop.value = before
        assert_same(finish(run), expected)
        assert not any(step.injections for step in s.journal)
    close_all(dj)


def test_one_of_two_edits_of_a_step_is_none() -> None:
    dj = shared("gpt2")
    with dj.session(seed=4) as s:
        run = start(s, [djinn.break_at(site, positions="generated", times=1) for site in (SITE, "resid_post.1")])
        next(run).value.mul_(2)
        second = next(run)
        second.value = second.value.clone()
        run.result()
        assert [set(step.injections) for step in s.journal if step.injections] == [{SITE}]
    close_all(dj)


def test_a_step_left_in_the_air_forgets_what_was_no_edit() -> None:
    """Its launch fails once; what is asked of the step afterwards knows nothing of an edit."""
    dj = shared("gpt2")
    with dj.session(seed=4) as s:
        run = start(s, [djinn.break_at(SITE, positions="generated", times=1)])
        stop = next(run)
        stop.value = stop.value.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("djinn_fx.runtime.executor.Executor.decode", _fails)
            with pytest.raises(RuntimeError, match="not today"):
                next(run)
        taken = s.checkpoint().wait()
        assert run.flight is not None and not run.flight.step.injections
        expected = finish(run)
        with dj.restore(taken) as twin:
            assert twin.run is not None
            assert_same(finish(twin.run), expected)
        assert not any(step.injections for step in s.journal)
    close_all(dj)


def _fails(*given: object) -> None:
    raise RuntimeError("not today")
