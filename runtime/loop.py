"""The decode loop of a compiled backend: one program per row bucket and variant, replayed over static buffers.

On CUDA a program is one CUDA graph. Each replay ends by making its own next inputs on the device (the most likely
token, the next position), so the next step may be launched before the host has read this one's tokens. Such a step
ahead is used if the host then asks for just that; else it was wasted, and nothing else: what it wrote to the arena
lies behind every session's length and is overwritten by the step that really comes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from djinn_fx.errors import InternalError
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.graphs import Replayed, Stream, capture
from djinn_fx.runtime.lanes import SLOTS, Lanes, Written
from djinn_fx.runtime.launch import Launch, LaunchValues
from djinn_fx.runtime.programs import ProgramCache
from djinn_fx.runtime.steps import UNKNOWN
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant

#: Variants, each of which does what those before it do.
_RICHNESS: Mapping[Variant, int] = {"plain": 0, "armed": 1, "rank": 2}


@dataclass
class DecodeLoop:
    """Decode steps of one set of sites.

    Attributes:
        programs: where programs come from.
        arena: the KV of all sessions.
        lanes: the static buffers.
    """

    programs: ProgramCache
    arena: KVArena
    lanes: Lanes
    _ready: dict[tuple[int, Variant], Replayed] = field(default_factory=dict, repr=False)
    _lane_of: dict[int, int] = field(default_factory=dict, repr=False)
    _stream: Stream = field(default=None, repr=False)
    _number: int = 0
    _recent: deque[weakref.ref[Launch]] = field(default_factory=partial(deque, maxlen=SLOTS - 1), repr=False)
    _last: Launch | None = field(default=None, repr=False)
    _ahead: Launch | None = field(default=None, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The compiled sites."""
        return self.lanes.sites

    @property
    def ahead(self) -> bool:
        """Whether a step was launched that nobody has asked for yet."""
        return self._ahead is not None

    # -- one step ------------------------------------------------------------------------------

    def decode(self, batch: Sequence[BatchRow]) -> list[LaunchValues | None]:
        """Run one decode step of every row, all in the shape of the first row's step.

        Rows whose step was launched ahead are served from there. Then nothing is launched now: None stands for the
        other rows, which should ride in the next :meth:`look_ahead`.
        """
        shape = batch[0].step.shape
        if any(row.step.shape != shape for row in batch) or len(batch) > min(shape.rows, self.lanes.count):
            raise InternalError("a decode batch mixes program shapes")
        launch, self._ahead = self._ahead, None
        lanes = [self._lane_of.get(row.arena_row, -1) for row in batch]
        served = [launch is not None and launch.serves(row, lane) for row, lane in zip(batch, lanes, strict=True)]
        if not any(served):
            lanes = self._seat(batch, shape.rows)
            launch = self._launch(dict(zip(lanes, batch, strict=True)), shape)
            served = [True] * len(batch)
        if launch is None:
            raise InternalError("a decode step was not launched")
        launch.taken()
        return [launch.value(row, lane) if mine else None for row, lane, mine in zip(batch, lanes, served, strict=True)]

    def look_ahead(self, batch: Sequence[BatchRow]) -> None:
        """Launch the next step of some rows before the host has seen this one's tokens.

        A step whose token is :data:`UNKNOWN` takes the one that the last launch leaves on the device for its row. Where
        that is impossible (another program is needed, or one that is not made yet) nothing is launched.
        """
        last = self._last
        if last is None or not batch or any(row.step.shape != last.shape for row in batch):
            return
        following = [row for row in batch if row.step.tokens[0] == UNKNOWN]
        if any(last.rows.get(self._lane_of.get(row.arena_row, -1)) is None for row in following):
            return
        riding = [row for row in batch if row.step.tokens[0] != UNKNOWN]
        lanes = self._seat([*following, *riding], last.shape.rows)
        self._ahead = self._launch(dict(zip(lanes, [*following, *riding], strict=True)), last.shape, ahead=True)

    def launch_for(self, batch: Sequence[BatchRow]) -> Launch:
        """The launch that runs a step of every row of a batch: the one made ahead, if it does, else a new one."""
        launch, self._ahead = self._ahead, None
        if launch is None or not all(launch.serves(row, self._lane_of.get(row.arena_row, -1)) for row in batch):
            lanes = self._seat(batch, batch[0].step.shape.rows)
            launch = self._launch(dict(zip(lanes, batch, strict=True)), batch[0].step.shape)
        if launch is None:
            raise InternalError("a decode step was not launched")
        launch.taken()
        return launch

    def lane_of(self, row: BatchRow) -> int:
        """The lane of a row that was launched."""
        return self._lane_of[row.arena_row]

    def repeat(self, last: Launch) -> Launch | None:
        """The step after ``last`` of all its rows, under the same tables; None if another launch came after it."""
        if self._last is not last or self._ahead is not None:
            return None
        last.end()
        self._run(self._ready[(last.shape.rows, last.variant)])
        self._last = last.following(self._number)
        return self._counted(self._last)

    def drop(self, row: int | None = None) -> None:
        """Give up what was launched ahead; with ``row`` only if it runs a step in that row of the arena."""
        ahead = self._ahead
        if ahead is not None and (row is None or any(mine.arena_row == row for mine in ahead.rows.values())):
            self._ahead = None

    def prepare(self, rows: int, variant: Variant) -> Replayed:
        """The program of a bucket and variant, compiled and captured now if it is the first time."""
        key = (rows, variant)
        if key not in self._ready:
            self.retire()
            shape = ProgramShape(rows, 1, 1)
            program = self.programs.get(shape, variant, self.sites)
            if program.variant != variant:  # they differ in their bits
                self._ready[key] = self.prepare(rows, program.variant)
                return self._ready[key]
            env = {**self.lanes.env(shape, program.variant), **self.arena.env}
            self.lanes.upload_ints({}, rows, 0)  # dead lanes: warming up writes nowhere
            if self._stream is None and self.lanes.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.lanes.device)
            self._ready[key] = capture(program, env, self.lanes.slot, self.lanes.ring, self._stream)
        return self._ready[key]

    def retire(self) -> None:
        """Move what the last launches left out of the static buffers, where somebody still wants it."""
        if self._last is not None:
            self._last.end()
        for launch in [known() for known in self._recent]:
            if launch is not None:
                launch.tokens()  # a program that warms up writes where tokens go
        self._last = self._ahead = None

    # -- launching -----------------------------------------------------------------------------

    def _seat(self, batch: Sequence[BatchRow], count: int) -> list[int]:
        """A lane below ``count`` for each row: the one it had, where that is free."""
        lanes: dict[int, int] = {}
        for row in batch:
            lane = self._lane_of.get(row.arena_row, count)
            if lane < count and lane not in lanes.values():
                lanes[row.arena_row] = lane
        free = iter([lane for lane in range(count) if lane not in set(lanes.values())])
        for row in batch:
            if row.arena_row not in lanes:
                lanes[row.arena_row] = next(free)
        self._lane_of = {**{r: lane for r, lane in self._lane_of.items() if lane not in set(lanes.values())}, **lanes}
        return [lanes[row.arena_row] for row in batch]

    def _launch(self, rows: Mapping[int, BatchRow], shape: ProgramShape, *, ahead: bool = False) -> Launch | None:
        """Run a step of the rows on their lanes; None if ``ahead`` and the program it needs is not made yet."""
        plans = {lane: self.lanes.plan(lane, row) for lane, row in rows.items()}
        variant = self._variant(rows, plans)
        if ahead:  # nothing is compiled for that; a richer program that is ready has the same bits
            found = [v for v in _RICHNESS if (shape.rows, v) in self._ready and _RICHNESS[v] >= _RICHNESS[variant]]
            if not found:
                return None
            variant = found[0]
        replayed = self.prepare(shape.rows, variant)
        last, self._last = self._last, None
        if last is not None:
            last.end()
        for lane in range(shape.rows):
            if lane in rows:
                self.lanes.write(lane, rows[lane], plans[lane])
            else:
                self.lanes.clear(lane)
        self.lanes.upload_flags()
        if last is None or not last.leads_to(rows, shape):
            self.lanes.upload_ints(rows, shape.rows, self._number)
        self._run(replayed)
        before = last if ahead else None
        made = Launch(shape, replayed.program.variant, rows, self.lanes, replayed.logits, self._number, before)
        self._last = self._counted(made)
        return made

    def _run(self, replayed: Replayed) -> None:
        """Run a program, once the place where its tokens go is free."""
        oldest = self._recent[0]() if len(self._recent) == self._recent.maxlen else None
        if oldest is not None:
            oldest.tokens()
        replayed.run()

    def _counted(self, launch: Launch) -> Launch:
        self._number += 1
        self._recent.append(weakref.ref(launch))
        return launch

    def _variant(self, rows: Mapping[int, BatchRow], plans: Mapping[int, Written]) -> Variant:
        needed: list[Variant] = [plan.variant for plan in plans.values()]
        if any(row.wants == "taps" for row in rows.values()):
            needed.append("armed")
        return max(needed, key=_RICHNESS.__getitem__)
