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
from djinn_fx.runtime.doubt import Question
from djinn_fx.runtime.graphs import Replayed, Runnable, Stream, capture
from djinn_fx.runtime.lanes import Lanes, Written
from djinn_fx.runtime.launch import Launch, LaunchValues, Seat
from djinn_fx.runtime.outbox import SLOTS
from djinn_fx.runtime.poised import Poised, poised
from djinn_fx.runtime.programs import ProgramCache
from djinn_fx.runtime.remainder import Beginnings
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
    _beginnings: Beginnings = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._beginnings = Beginnings(self.sites)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The compiled sites."""
        return self.lanes.sites

    @property
    def launched(self) -> Launch | None:
        """The step launched ahead that nobody has asked for yet."""
        return self._ahead

    # -- one step ------------------------------------------------------------------------------

    def decode(self, batch: Sequence[BatchRow], launch: Launch | None = None) -> list[LaunchValues | None]:
        """Run one decode step of every row, all in the shape of the first row's step.

        Rows whose step was launched ahead are served from there. Then nothing is launched now: None stands for the
        other rows, which should ride in the next :meth:`look_ahead`.

        Args:
            batch: the rows.
            launch: what :meth:`board` gave, if it was called.
        """
        shape = batch[0].step.shape
        if any(row.step.shape != shape for row in batch) or len(batch) > min(shape.rows, self.lanes.count):
            raise InternalError("a decode batch mixes program shapes")
        if launch is not None:
            return [launch.serves(row) for row in batch]
        launch = self.board()
        served = [None if launch is None else launch.serves(row) for row in batch]
        if not any(served):
            launch = self._launch_now(batch)
            served = [launch.serves(row) for row in batch]
        return served

    def board(self) -> Launch | None:
        """Take the step that was launched ahead."""
        launch, self._ahead = self._ahead, None
        return launch

    def look_ahead(self, batch: Sequence[BatchRow], staying: Sequence[Seat] = ()) -> None:
        """Launch the next step of some rows before the host has seen this one's tokens.

        A step whose token is :data:`UNKNOWN` takes the one that the last launch leaves on the device for its row. Where
        that is impossible (another program is needed, or one that is not made yet) nothing is launched.

        Args:
            batch: the rows' next steps.
            staying: seats of the last launch whose steps go on.
        """
        last = self._last
        if last is None or any(row.step.shape != last.shape for row in batch):
            return
        following = [row for row in batch if row.step.tokens[0] == UNKNOWN]
        if any(last.seat_of(row.arena_row) is None for row in following):
            return
        if any(last.rows.get(seat.lane) is not seat for seat in staying):
            return
        riding = [row for row in batch if row.step.tokens[0] != UNKNOWN]
        rows = self._seats([*following, *riding], last.shape.rows, staying)
        if rows:
            self._ahead = self._try_ahead(rows, last)

    def launch_for(self, batch: Sequence[BatchRow]) -> tuple[Launch, list[int]]:
        """The launch that runs a step of every row of a batch, and the lane of each.

        It is the one made ahead, if that does, else a new one.
        """
        launch = self.board()
        served = [None if launch is None else launch.serves(row) for row in batch]
        if launch is None or not all(served):
            launch = self._launch_now(batch)
        return launch, [self._lane_of[row.arena_row] for row in batch]

    def repeat(self, last: Launch) -> Launch | None:
        """The step after ``last`` of all its rows, under the same tables; None if another launch came after it."""
        if self._last is not last or self._ahead is not None:
            return None
        last.end()
        self._last = None
        self._run(self._ready[(last.shape.rows, last.variant)].step)
        self._last = made = self._counted(last.following(self._number))
        return made

    def poise(self, row: BatchRow, launch: Launch, site: Site) -> Poised | None:
        """Make a step that a launch ran for a row ready to run again with another value of a site.

        None where more than the value would have to change, or others' steps ran with it.
        """
        replayed = self._ready.get((launch.shape.rows, launch.variant))
        if self._last is not launch or replayed is None or not self._alone(launch):
            return None
        return poised(launch, replayed, self.lanes, row, site, self._number, self._beginnings)

    def fits(self, poised: Poised) -> bool:
        """Whether nothing ran here since a step was poised, so that it may go on."""
        last = self._last
        return last is poised.launch and self._alone(last) and self.lanes.written[poised.seat.lane] is poised.now

    def go(self, poised: Poised, value: torch.Tensor, question: Question) -> Launch:
        """Run a poised step that :meth:`fits` with a value.

        Args:
            poised: the step.
            value: as what its site had; aligned.
            question: whether it differs from what was there.
        """
        replayed, seat, shape = poised.replayed, poised.seat, poised.launch.shape
        poised.launch.end()
        self._last, (way, part) = None, poised.ready()
        taken = (value, way.place, poised.own, question.word)
        self.lanes.inject(seat.lane, way.plan, poised.numbers, shape.rows, self._number, taken, post=part.opens)
        made = self._start(replayed, part, shape, {seat.lane: seat}, None)
        self.lanes.sent()
        question.asked(made.arrived)
        return made

    def _alone(self, last: Launch) -> bool:
        """Whether a launch ran the step of one row, tapped, and nothing has changed since."""
        return len(last.rows) == 1 and last.tapped and last.whole and self._ahead is None

    def drop(self, row: int | None = None) -> None:
        """Give up what was launched ahead; with ``row`` only if it runs a step in that row of the arena.

        Nothing of the last launch is taken over then either: what the row holds may be something else, and a step of
        the past is run again under the weights as they are.
        """
        ahead, last = self._ahead, self._last
        if ahead is not None and (row is None or ahead.seat_of(row) is not None):
            self._ahead = None
        if last is not None and (row is None or last.seat_of(row) is not None):
            last.whole = False

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
            self.lanes.upload({}, rows, 0)  # dead lanes: warming up writes nowhere
            if self._stream is None and self.lanes.device.type == "cuda":
                self._stream = torch.cuda.Stream(self.lanes.device)
            opening = self.lanes.opening(rows)
            self._ready[key] = capture(program, env, self.lanes.slot, self.lanes.ring, self._stream, opening)
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

    def _seats(self, batch: Sequence[BatchRow], count: int, staying: Sequence[Seat] = ()) -> dict[int, Seat]:
        """A seat on a lane below ``count`` for each row, the lane it had, where that is free; and those that stay."""
        rows = {seat.lane: seat for seat in staying}
        later: list[BatchRow] = []
        for row in batch:
            lane = self._lane_of.get(row.arena_row, count)
            if lane < count and lane not in rows:
                rows[lane] = Seat(row, lane, self._number)
            else:
                later.append(row)
        if later:
            free = [lane for lane in range(count) if lane not in rows][: len(later)]
            rows |= {lane: Seat(row, lane, self._number) for lane, row in zip(free, later, strict=True)}
            gone = {row: lane for row, lane in self._lane_of.items() if lane not in rows}
            self._lane_of = gone | {seat.row.arena_row: lane for lane, seat in rows.items()}
        return rows

    def _try_ahead(self, rows: Mapping[int, Seat], last: Launch) -> Launch | None:
        """Run the next step of seats behind ``last``; None if no program that does is made yet.

        A richer program has the same bits; what it leaves beside them nobody asks for.
        """
        plans = self._plans(rows)
        variant = self._variant(rows, plans)
        found = [v for v in _RICHNESS if (last.shape.rows, v) in self._ready and _RICHNESS[v] >= _RICHNESS[variant]]
        return self._launch(rows, last.shape, plans, found[0], last) if found else None

    def _launch_now(self, batch: Sequence[BatchRow]) -> Launch:
        """Run a step of every row in the cheapest program that does, compiled now if it is the first time."""
        shape = batch[0].step.shape
        rows = self._seats(batch, shape.rows)
        plans = self._plans(rows)
        return self._launch(rows, shape, plans, self._variant(rows, plans))

    def _launch(
        self,
        rows: Mapping[int, Seat],
        shape: ProgramShape,
        plans: Mapping[int, Written],
        variant: Variant,
        before: Launch | None = None,
    ) -> Launch:
        """Run a step of seats.

        Args:
            rows: the seat of each lane that runs one.
            shape: the program's shape.
            plans: what each of these lanes must hold.
            variant: the program's variant.
            before: the launch that leaves the tokens which only the device knows.
        """
        replayed = self.prepare(shape.rows, variant)
        last = self._last
        begin = 0
        if last is not None and self._ready.get((last.shape.rows, last.variant)) is replayed:
            begin = self._beginnings.begin(replayed.program, last, rows, self._number, self.lanes.written, plans)
        if last is not None:
            last.end()  # until here it is the last one: an interrupt must not leave it without its end
        self._last = None
        for lane in range(shape.rows):
            if lane not in rows:
                self.lanes.clear(lane)
            elif plans[lane] is not self.lanes.written[lane]:
                self.lanes.write(lane, rows[lane].row, plans[lane])
        changed = None if last is None else last.changed(rows, shape, self._number)
        if changed is None:
            self.lanes.upload(self._numbers(rows), shape.rows, self._number)
        else:
            some = self._numbers({lane: rows.get(lane) for lane in changed})
            self.lanes.change(some, shape.rows, self._number)
        return self._start(replayed, replayed.part(begin), shape, rows, before)

    def _start(
        self, replayed: Replayed, part: Runnable, shape: ProgramShape, rows: Mapping[int, Seat], before: Launch | None
    ) -> Launch:
        """Run what the lanes were made ready for; it is the last launch then."""
        self._run(part)
        made = Launch(shape, replayed.program.variant, rows, self.lanes, replayed.logits, self._number, before)
        self._last = self._counted(made)
        return made

    def _plans(self, rows: Mapping[int, Seat]) -> dict[int, Written]:
        """What each lane must hold; what it holds already, where its seat was in the last launch."""
        known = {} if self._last is None else self._last.rows
        written = self.lanes.written
        return {
            lane: written[lane] if known.get(lane) is seat else self.lanes.plan(lane, seat.row)
            for lane, seat in rows.items()
        }

    def _numbers(self, rows: Mapping[int, Seat | None] | Mapping[int, Seat]) -> dict[int, tuple[int, int, int, int]]:
        """What each lane forwards in the next launch: token, position, row of the arena, length."""
        found = {}
        for lane, seat in rows.items():
            if seat is None:
                found[lane] = self.lanes.dead
                continue
            start, token = seat.start(self._number), seat.row.step.tokens[0]
            token = token if seat.number == self._number else UNKNOWN
            found[lane] = (token, start, seat.row.arena_row, start + 1)
        return found

    def _run(self, part: Runnable) -> None:
        """Run a step or a part of one, once the place where its tokens go is free."""
        oldest = self._recent[0]() if len(self._recent) == self._recent.maxlen else None
        if oldest is not None:
            oldest.tokens()
        part.run()

    def _counted(self, launch: Launch) -> Launch:
        self._number += 1
        self._recent.append(weakref.ref(launch))
        return launch

    def _variant(self, rows: Mapping[int, Seat], plans: Mapping[int, Written]) -> Variant:
        needed: Variant = "plain"
        for lane, seat in rows.items():
            variant = plans[lane].variant
            if variant == "plain" and seat.row.wants == "taps":
                variant = "armed"
            if variant == "rank":
                return variant
            if variant == "armed":
                needed = variant
        return needed
