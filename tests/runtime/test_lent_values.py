"""The value of a stop that nobody looked at goes into a checkpoint as it is; whoever asks later has one of his own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.run import Run
from tests.bits import assert_same_bits
from tests.runtime.checkpoint_cases import assert_same, close_all, edit, finish, run_of, shared, start
from tests.runtime.tiny import some


@pytest.fixture(params=["gpt2", "llama-bf16"])
def dj(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    made = shared(request.param)
    yield made
    close_all(made)


def stopped(dj: djinn.Dj, reached: int) -> Run:
    """A run at a stop that nobody looked at: in its first chunk, its second, or decoding."""
    run = start(dj.session(seed=5), ["resid_post.1"])
    for _ in range(reached):
        next(run)
    return run


@pytest.mark.parametrize("reached", [1, 2, 4])
def test_checkpoints_before_and_after_a_look(dj: djinn.Dj, reached: int) -> None:
    run, twin = stopped(dj, reached), stopped(dj, reached)
    stop = some(run.stop)
    value = some(twin.stop).value.clone()
    plain = finish(twin)
    early = [stop.checkpoint() for _ in range(2)]
    assert stop.untouched
    edit(stop)  # nothing that was sent may change
    late = stop.checkpoint()
    assert stop.written and not stop.untouched
    edited = finish(run)
    for one in early:
        with dj.restore(one) as session:
            assert_same_bits(some(run_of(session).stop).value, value)
            assert_same(finish(run_of(session)), plain)
    with dj.restore(late) as session:
        assert_same(finish(run_of(session)), edited)


def test_a_value_that_was_sent_is_given_once(dj: djinn.Dj) -> None:
    stop = some(stopped(dj, 2).stop)
    sent = stop._value
    stop.checkpoint()
    value = stop.value
    assert value is not sent and value is stop.value and not stop.written
    assert_same_bits(value, sent)
    stop.checkpoint()
    assert stop.value is value


def test_an_assignment_after_a_checkpoint(dj: djinn.Dj) -> None:
    run, twin = stopped(dj, 2), stopped(dj, 2)
    stop, other = some(run.stop), some(twin.stop)
    checkpoint = stop.checkpoint()
    stop.value = new = torch.zeros_like(stop.content)
    other.value = new
    assert stop.value.eq(0).all() and stop.written
    assert_same(finish(run), finish(twin))
    with dj.restore(checkpoint) as session:
        assert some(run_of(session).stop).value.ne(0).any()


def test_a_value_in_another_order_is_sent_as_a_copy(dj: djinn.Dj) -> None:
    stop = some(stopped(dj, 2).stop)
    value = stop._value.clone()
    stop._value = turned = value.t().contiguous().t()
    stop._given = turned, turned._version
    assert not turned.is_contiguous()
    checkpoint = stop.checkpoint()
    assert stop.value is turned
    turned.zero_()
    with dj.restore(checkpoint) as session:
        assert_same_bits(some(run_of(session).stop).value, value)


def test_taken_in_inference_mode_and_written_outside(dj: djinn.Dj) -> None:
    run, twin = stopped(dj, 2), stopped(dj, 2)
    with torch.inference_mode():
        checkpoint = some(run.stop).checkpoint()
        value = some(run.stop).value
    assert not value.is_inference()
    edit(some(run.stop))
    edit(some(twin.stop))
    assert_same(finish(run), finish(twin))
    with dj.restore(checkpoint) as session, torch.no_grad():
        assert some(run_of(session).stop).value.ne(0).any()


def test_many_threads_are_given_one_value(dj: djinn.Dj) -> None:
    stop = some(stopped(dj, 2).stop)
    before, gate, found = stop._value.clone(), threading.Barrier(7), list[torch.Tensor]()

    def ask() -> None:
        gate.wait(20)
        found.append(stop.value)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    gate.wait(20)
    checkpoints = [stop.checkpoint() for _ in range(5)]
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(value is found[0] for value in found) and stop.value is found[0]
    found[0].zero_()
    for one in checkpoints:
        with dj.restore(one) as session:
            assert_same_bits(some(run_of(session).stop).value, before)


def test_without_memory_for_ones_own_the_run_stands_where_it_stood(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, twin = stopped(dj, 2), stopped(dj, 2)
    stop = some(run.stop)
    stop.checkpoint()

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", refuse)
        with pytest.raises(djinn.CapacityError, match="no memory for a stop's value"):
            _ = stop.value
    assert stop.untouched
    edit(stop)
    edit(some(twin.stop))
    assert_same(finish(run), finish(twin))
