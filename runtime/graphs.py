"""A decode program made ready to run again and again: on CUDA as one graph, elsewhere as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from djinn_fx.kernels.advance import advance
from djinn_fx.program import LENGTHS, LOGITS, POSITIONS, TOKENS, Feed, Program
from djinn_fx.runtime.copies import copy_all
from djinn_fx.runtime.modes import outside_inference
from djinn_fx.runtime.remainder import behind
from djinn_fx.runtime.segments import Env, run_segments
from djinn_fx.sites import Site

#: Runs before a graph is captured: kernels are compiled and tuned in the first, and libraries make their workspaces.
WARMUP = 2

#: Graphs of later parts of a program that are kept: their nodes grow with the square of its layers.
REMAINDERS = 16

#: How often a part is asked for until it gets a graph: to capture it takes as long as a dozen steps of a small model.
REPEATS = 16

#: The stream programs are captured on; None on the CPU.
Stream = torch.cuda.Stream | None


@dataclass(frozen=True, eq=False)
class Runnable:
    """A step, or a part of one, that runs on the current stream without waiting; on CUDA it is a graph.

    Attributes:
        run: runs it.
        graph: the graph.
        opens: whether it begins by opening a letter that is for it: see :meth:`djinn_fx.runtime.outbox.Outbox.post`.
    """

    run: Callable[[], None]
    graph: torch.cuda.CUDAGraph | None = None
    opens: bool = False


@dataclass(frozen=True, eq=False)
class Replayed:
    """A program over static buffers.

    What its segments hand to one another stays where it is until the next run, so that a step may be run again from
    one of them on.

    Attributes:
        program: the program.
        step: runs a whole step.
        values: what the last run made, by environment name; the next one overwrites it.
    """

    program: Program
    step: Runnable
    values: Env
    _end: Callable[[Env], None]
    _opening: Callable[[], None] | None
    _stream: Stream
    _rests: dict[int, Runnable] = field(default_factory=dict, repr=False)
    _asked: dict[int, int] = field(default_factory=dict, repr=False)
    _behind: dict[str, int | None] = field(default_factory=dict, repr=False)

    def part(self, first: int = 0) -> Runnable:
        """A step from one of its segments on, or the whole step where that part is not ready.

        Args:
            first: the segment to begin with: what those before it made in the last run, and wrote to the arena, is
                what they would make now.
        """
        rest = self._rest(first) if first else None
        return rest or self.step

    def behind(self, site: Site) -> tuple[int, torch.Tensor] | None:
        """The segment behind a site, and what it takes the site's value from, ``[rows, ...]``, as the last run left it.

        None where the value cannot be replaced there: something else lies in the same memory, or was made from it.
        """
        if site.name not in self._behind:
            self._behind[site.name] = behind(self.program, site) if self._apart(site.name) else None
        begin = self._behind[site.name]
        return None if begin is None else (begin, self.values[site.name])

    def _apart(self, name: str) -> bool:
        """Whether a value lies in memory that no other lies in."""
        if name not in self.values or not self.values[name].is_contiguous():
            return False
        place = self.values[name].untyped_storage().data_ptr()
        return sum(value.untyped_storage().data_ptr() == place for value in self.values.values()) == 1

    def logits(self) -> torch.Tensor:
        """The logits ``[rows, 1, vocab]`` of the last run; the next one overwrites them."""
        return self.values[LOGITS]

    def _rest(self, first: int) -> Runnable | None:
        """Runs the segments from ``first`` on; None for a whole step: at first, and where weights stream."""
        if self.program.feed is not None:
            return None
        rest = self._rests.pop(first, None)
        if rest is None:
            self._asked[first] = self._asked.get(first, 0) + 1
            if self._stream is not None and self._asked[first] < REPEATS:
                return None
            self._asked[first] = 0
            self._make_room()
            try:
                rest = self._remainder(first)
            except torch.OutOfMemoryError:
                return None
        self._rests[first] = rest  # those used last stand last
        return rest

    def _make_room(self) -> None:
        """Forget the remainder that was not used for longest, if there are too many."""
        if len(self._rests) >= REMAINDERS:
            if self._stream is not None:
                torch.cuda.current_stream(self._stream.device).synchronize()  # it may be running
            del self._rests[next(iter(self._rests))]

    def _remainder(self, first: int) -> Runnable:
        made = sorted({name for segment in self.program.segments[first:] for name in segment.outputs})
        beside = None if self._stream is None else torch.cuda.Stream(self._stream.device)
        opening = None if self._stream is not None and self.step.graph is None else self._opening

        @torch.no_grad()
        def step() -> None:
            env = dict(self.values)
            if opening is not None:
                opening()
            run_segments(self.program, env, first, len(self.program.segments) - 1)
            with _branch(beside):  # whoever waits for the token does not wait for these copies
                copy_all([self.values[name] for name in made], [env[name] for name in made])
            self._end(env)
            if beside is not None:
                torch.cuda.current_stream(beside.device).wait_stream(beside)

        if self._stream is None or self.step.graph is None:
            return Runnable(step, opens=opening is not None)
        values = [self.values[name] for name in made]
        copy_all(values, [value.clone() for value in values])  # so that no kernel is loaded in a capture
        if opening is not None:
            opening()  # likewise; there is no letter for now
        return replace(_part_captured(step, self._stream, self.step.graph), opens=opening is not None)


@contextmanager
def _branch(stream: Stream) -> Iterator[None]:
    """Inside, work goes to another stream, behind what the current one was given; None: to the current one."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def capture(
    program: Program,
    inputs: Env,
    slot: torch.Tensor,
    ring: torch.Tensor,
    stream: Stream,
    opening: Callable[[], None] | None = None,
) -> Replayed:
    """Make a program ready to run over ``inputs``, which must stay where they are.

    The lanes must be dead meanwhile, so that warming up writes nowhere.

    Args:
        program: the program.
        inputs: its inputs by environment name.
        slot: as :func:`djinn_fx.kernels.advance.advance` takes it.
        ring: likewise.
        stream: where to warm up and capture on CUDA; one for all programs, since libraries keep memory per stream.
        opening: what graphs of parts of it begin with, if anything.
    """
    values: Env = {}

    def end(env: Env) -> None:
        advance(env[LOGITS][:, 0], env[TOKENS][:, 0], env[POSITIONS][:, 0], env[LENGTHS], slot, ring)

    @torch.no_grad()
    def step() -> None:
        env = dict(inputs)
        with outside_inference():  # a part of the step that runs again writes to what it makes, wherever that is
            run_segments(program, env, 0, len(program.segments) - 1)
        values.update(env)
        end(env)

    made = Runnable(step) if stream is None else _captured(step, stream, program.feed)
    return Replayed(program, made, values, end, opening, stream)


def _captured(step: Callable[[], None], stream: torch.cuda.Stream, feed: Feed | None) -> Runnable:
    """Warm up on a stream of its own and capture the step as a CUDA graph."""
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as long as they leave this stream alone.
        with (
            nullcontext() if feed is None else feed.capturing(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
            if feed is not None:
                feed.join()
    if feed is None:
        return Runnable(graph.replay, graph)

    def replay() -> None:
        with feed.replaying():
            graph.replay()

    return Runnable(replay, graph)


def _part_captured(step: Callable[[], None], stream: torch.cuda.Stream, whole: torch.cuda.CUDAGraph) -> Runnable:
    """Capture a part of what a graph holds: it is warm, and takes the graph's memory: the two never run at a time.

    By hand: ``torch.cuda.graph()`` would collect garbage and empty the caches of memory first, in the middle of a run.
    """
    with torch.cuda.device(stream.device):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=whole.pool(), capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    return Runnable(graph.replay, graph)
