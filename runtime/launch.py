"""What a launched decode step leaves behind: tokens for the host, and values that live until the next launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from djinn_fx.errors import InternalError
from djinn_fx.runtime.captured import KeptSites, Snapshot
from djinn_fx.runtime.lanes import Lanes
from djinn_fx.runtime.modes import outside_inference, without_grad
from djinn_fx.runtime.outbox import SLOTS
from djinn_fx.runtime.steps import UNKNOWN, Step
from djinn_fx.runtime.tables import BatchRow, Wants
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant

#: A view keeps the whole of a snapshot; it is handed out where so much of that is wanted.
LEAST = 0.5


@dataclass(frozen=True, eq=False)
class Seat:
    """A lane that runs the steps of one row, from launch to launch, as long as nothing but the place changes.

    Attributes:
        row: the step of its first launch.
        lane: the lane.
        number: of its first launch.
    """

    row: BatchRow
    lane: int
    number: int

    def start(self, number: int) -> int:
        """Position of the token that it forwards in a launch."""
        return self.row.step.start + number - self.number


class Launch:
    """One decode step of some lanes, enqueued on the device.

    Attributes:
        rows: the seat of each live lane.
        number: counts the launches of these lanes; says where its tokens go.
        arrived: passes when it is done; None on the CPU.
        whole: whether what it read from and wrote to the arena is still there.

    Args:
        shape: the program's shape.
        variant: the program's variant.
        rows: see above.
        lanes: the buffers it ran over.
        logits: gives the program's logits.
        number: see above.
        before: the launch whose tokens it took over on the device; None if they came from the host.
    """

    def __init__(
        self,
        shape: ProgramShape,
        variant: Variant,
        rows: Mapping[int, Seat],
        lanes: Lanes,
        logits: Callable[[], torch.Tensor],
        number: int,
        before: Launch | None = None,
    ) -> None:
        self.shape, self.variant, self.rows, self.number = shape, variant, rows, number
        self._before = before
        self._by_row = {seat.row.arena_row: seat for seat in rows.values()}
        self._lanes, self._logits = lanes, logits
        self._values: list[weakref.ref[LaunchValues]] = []
        self._over, self.whole = False, True
        self._tokens = lanes.ring[number % SLOTS, : shape.rows]
        self.arrived = lanes.outbox.passed(number)
        self._read: list[int] | None = None

    def following(self, number: int) -> Launch:
        """The same rows, one step on, enqueued just now."""
        return Launch(self.shape, self.variant, self.rows, self._lanes, self._logits, number)

    @property
    def over(self) -> bool:
        """Whether the static buffers hold another step by now."""
        return self._over

    @property
    def tapped(self) -> bool:
        """Whether sites' values were kept."""
        return self.variant != "plain"

    def tokens(self) -> list[int]:
        """Each lane's most likely next token; waits for the device."""
        if self._read is None:
            # It has passed where somebody waited for what was enqueued behind it.
            if self.arrived is not None and not self.arrived.query():
                self.arrived.synchronize()
            self._read = self._tokens.tolist()
        return self._read

    def seat_of(self, arena_row: int) -> Seat | None:
        """The seat of the session in a row of the arena, if it has one."""
        return self._by_row.get(arena_row)

    def fed(self, seat: Seat) -> int:
        """The token that it forwards for a seat, :data:`UNKNOWN` if that is past finding out.

        Waits for the launch before, if only the device knew it.
        """
        if seat.number == self.number and seat.row.step.tokens[0] != UNKNOWN:
            return seat.row.step.tokens[0]
        return UNKNOWN if self._before is None else self._before.tokens()[seat.lane]

    def serves(self, row: BatchRow) -> LaunchValues | None:
        """What this launch leaves for a row, if it runs just the step that the row asks for."""
        seat = self.seat_of(row.arena_row)
        if seat is None or row.step.shape != self.shape or (row.wants == "taps" and not self.tapped):
            return None
        mine = seat.row.step
        if mine is not row.step or seat.number != self.number:
            alike = seat.start(self.number) == row.step.start and _same_but_place(mine, row.step)
            if not alike or self.fed(seat) != row.step.tokens[0]:
                return None
        found = LaunchValues(row.step, seat.lane, self, row.wants)
        self._values.append(weakref.ref(found))
        return found

    def changed(self, rows: Mapping[int, Seat], shape: ProgramShape, number: int) -> list[int] | None:
        """The lanes whose inputs, as it left them on the device, are not those of ``rows`` in launch ``number``.

        None if that is so of all of them: it was a launch of another shape, or there were others since.
        """
        if shape != self.shape or number != self.number + 1:
            return None
        found = [lane for lane in self.rows if lane not in rows]
        for lane, seat in rows.items():
            mine = self.rows.get(lane)
            if mine is seat:
                continue
            token = seat.row.step.tokens[0]
            if (
                mine is None
                or mine.row.arena_row != seat.row.arena_row
                or mine.start(number) != seat.start(number)
                or (token != UNKNOWN and token != self.tokens()[lane])
            ):
                found.append(lane)
        return found

    def end(self) -> None:
        """The buffers will be overwritten: copy what somebody still wants of them."""
        if not self._over:
            self.keep()
        self._over, self._before = True, None

    def keep(self) -> None:
        """Copy what somebody wants of the buffers, all in one go; whoever has a copy reads from that."""
        served = [value for known in self._values if (value := known()) is not None]
        wanted = [value for value in served if value.wants != "token" and not value.kept]
        if wanted:
            lanes = {value.lane for value in wanted}
            tapped = any(value.wants == "taps" for value in wanted)
            snapshot = self._snapshot(lanes, tapped=tapped)
            for value in wanted:
                value.keep(snapshot)

    @without_grad
    def _snapshot(self, lanes: set[int], *, tapped: bool) -> Snapshot:
        first, rows = next(iter(lanes)), self.shape.rows
        chosen = slice(first, first + 1) if len(lanes) == 1 else slice(0, rows)
        with outside_inference():
            taps = tuple(tap[:, chosen].clone() for tap in self._lanes.taps) if tapped and self.tapped else ()
            part = len(lanes) / (chosen.stop - chosen.start)
            return Snapshot(chosen.start, self._logits()[chosen].clone(), taps, part)

    @cached_property
    def here(self) -> Snapshot:
        """The static buffers themselves, while they hold this step."""
        return Snapshot(0, self._logits(), tuple(self._lanes.taps) if self.tapped else ())

    @property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """Where the taps hold a site, by name: which buffer, and at which index."""
        return self._lanes.tap_of

    def place(self, site: Site) -> tuple[int, int] | None:
        """Where the taps hold a site, if they do."""
        return self.places.get(site.name)


class LaunchValues:
    """What a launched step left for one row.

    Attributes:
        step: the step.
        lane: its lane.
        wants: what may be asked of it later: ``"token"``, ``"logits"`` or ``"taps"``.
        shared: whether another session's step in the air reads from it too.
    """

    def __init__(self, step: Step, lane: int, launch: Launch, wants: Wants) -> None:
        self.step, self.lane, self.wants, self.shared = step, lane, wants, False
        self._launch = launch
        self._kept: Snapshot | None = None

    @property
    def launch(self) -> Launch:
        """What left them."""
        return self._launch

    @property
    def kept(self) -> bool:
        """Whether it reads from a snapshot."""
        return self._kept is not None

    def keep(self, snapshot: Snapshot) -> None:
        """Read from a snapshot from now on."""
        self._kept = snapshot

    def own(self, sites: Sequence[Site], part: float) -> Mapping[str, torch.Tensor]:
        """Values of ``sites`` as tensors that nobody else writes or reads, ``[1, *feature_shape]``.

        They are views of the snapshot, made when asked for, where the ``part`` of all sites makes up most of it; else
        copies.
        """
        if self.wants == "taps" and self._kept is None and not self._launch.over:
            self._launch.keep()
        if self._kept is not None and self._kept.wanted * part >= LEAST and not self.shared:
            names = tuple(site.name for site in sites)
            if all(name in self._launch.places for name in names):
                return KeptSites(self._kept, self.lane, names, self._launch.places)
        return {site.name: self.value(site).clone() for site in sites}

    def _source(self) -> Snapshot | None:
        if self._kept is not None:
            return self._kept
        return None if self._launch.over else self._launch.here

    @property
    def token(self) -> int | None:
        """The most likely next token; waits for the device."""
        return self._launch.tokens()[self.lane]

    def has(self, site: Site) -> bool:
        """Whether the value of ``site`` can still be read."""
        source = self._source()
        return source is not None and bool(source.taps) and self._launch.place(site) is not None

    def value(self, site: Site) -> torch.Tensor:
        """Value of ``site``, ``[1, *feature_shape]``; a view, copy before handing it out."""
        source, place = self._source(), self._launch.place(site)
        if source is None or not source.taps or place is None:
            raise InternalError(f"the value of {site.name!r} was not kept")
        lane = self.lane - source.first
        return source.taps[place[0]][place[1], lane : lane + 1]

    def gather(self, sites: Sequence[Site]) -> list[tuple[tuple[Site, ...], torch.Tensor]] | None:
        """Copies of the values of many sites, those of one shape together: ``[sites, *feature_shape]``.

        None if one of them was not kept.
        """
        source = self._source()
        if source is None or not source.taps:
            return None
        alike: dict[int, list[tuple[int, Site]]] = {}
        for site in sites:
            place = self._launch.place(site)
            if place is None:
                return None
            alike.setdefault(place[0], []).append((place[1], site))
        lane, found = self.lane - source.first, []
        for number, members in alike.items():
            tap, ranks = source.taps[number], [rank for rank, _ in members]
            whole = ranks == list(range(tap.shape[0]))
            values = tap[:, lane].clone() if whole else torch.stack([tap[rank, lane] for rank in ranks])
            found.append((tuple(site for _, site in members), values))
        return found

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the step, ``[1, vocab]``; a view."""
        source = self._source()
        if source is None:
            raise InternalError("the logits of a step were not kept")
        return source.logits[self.lane - source.first]


def _same_but_place(ahead: Step, step: Step) -> bool:
    """Whether a step launched ahead is ``step`` but for its token and its place."""
    return (
        len(step.steering) == len(ahead.steering) == 1
        and ahead.steering[0][1] is step.steering[0][1]
        and not (step.injections or ahead.injections)
        and (ahead.last_prompt, ahead.sampled) == (step.last_prompt, step.sampled)
    )


def to_host(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy of a small tensor on the host, which arrives when the event has passed."""
    if numbers.device.type == "cpu":
        return numbers.clone(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    return host, passed(numbers.device)


def passed(device: torch.device) -> torch.cuda.Event | None:
    """An event that passes when all is done that was enqueued so far; None on the CPU, where it is done."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
