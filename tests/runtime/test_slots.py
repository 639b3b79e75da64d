"""The order of copies on a GPU, played on the CPU: copies run as late as they may, segments at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.specs import ProgramShape
from tests.backends import least
from tests.bits import assert_same_bits
from tests.runtime.streams import LAYERS, compiled, feed_of, make, model_of, weights_of, whole


class Stream:
    """A stream that runs as late as it may: when somebody waits for it."""

    def __init__(self, number: int) -> None:
        self.stream_id, self.done = number, 0
        self.todo: list[Callable[[], object]] = []
        self.waits: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waits.append(event)
        event.stream.run(event.place)

    def run(self, place: int) -> None:
        while self.done < place:
            self.todo[self.done]()
            self.done += 1


class Event:
    """A place in a stream."""

    made = 0
    stream: Stream

    def record(self, stream: Stream) -> None:
        Event.made += 1
        self.stream, self.place, self.number = stream, len(stream.todo), Event.made


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[djinn.Dj, Stream, Stream]]:
    """A model whose copies run late, its stream of copies and that of its segments, which run at once."""
    model = model_of("gpt2")
    dj = make(model, "eager", least(model))
    slots = weights_of(dj).slots
    copies, segments = Stream(1), Stream(0)

    def enqueue(target: Tensor, source: Tensor) -> None:
        copies.todo.append(lambda: target.copy_(source))

    monkeypatch.setattr(slots, "_stream", copies)
    monkeypatch.setattr(slots, "_copy", enqueue)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: segments)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: copies.run(len(copies.todo)))
    yield dj, copies, segments


def test_a_segment_waits_for_its_copy_and_a_copy_for_the_segments_before_it(
    lazy: tuple[djinn.Dj, Stream, Stream],
) -> None:
    dj, copies, _ = lazy
    expected = whole(compiled("gpt2", "eager", False))
    for slot in weights_of(dj).slots.slots:
        slot.memory.fill_(0xA5)
        slot.holds = None
    copies.todo, copies.done = [], 0
    assert_same_bits(whole(dj), expected)
    steps = 2 + 4
    assert len(copies.todo) == 2 + LAYERS * steps  # the first two, then one behind each layer
    waited = [event for event in copies.waits if event.stream.stream_id == 0]
    assert len(waited) == LAYERS * steps  # each but the first two waits for the layer that was there


def test_a_captured_step_begins_and_ends_alike_and_waits_for_nothing_outside(
    lazy: tuple[djinn.Dj, Stream, Stream],
) -> None:
    dj, copies, segments = lazy
    whole(dj)
    feed = feed_of(dj.engine.programs.get(ProgramShape(1, 1, 1), "plain", dj.engine.sites))
    slots = weights_of(dj).slots.slots
    dj([5, 6])
    with feed.capturing():
        begun, first = Event.made, len(copies.todo)
        assert copies.done == first  # nothing is under way
        copies.waits.clear()
        segments.waits.clear()
        for index in range(len(feed.uses)):
            with feed.running(index):
                pass
        feed.join()
        assert copies.done == len(copies.todo) == first + LAYERS
        assert all(event.number > begun for event in [*copies.waits, *segments.waits])
    assert all(slot.arrived is None and not slot.read for slot in slots)
    assert [slot.holds for slot in slots] == [0, 1]
    with feed.replaying():
        pass
    after: list[Any] = [slot.arrived for slot in slots]
    assert all(event is not None and event.stream is segments for event in after)


def test_a_capture_that_fails_leaves_nothing_to_rely_on(lazy: tuple[djinn.Dj, Stream, Stream]) -> None:
    dj, _, _ = lazy
    expected = whole(dj)
    feed = feed_of(dj.engine.programs.get(ProgramShape(1, 1, 1), "plain", dj.engine.sites))
    with pytest.raises(RuntimeError, match="no memory"), feed.capturing():
        for index in range(3):
            with feed.running(index):
                pass
        raise RuntimeError("no memory")
    assert all(slot.holds is None for slot in weights_of(dj).slots.slots)
    assert_same_bits(whole(dj), expected)
