"""Poised steps: a decode step at a stop, ready to run on with another value there.

A run that somebody edits goes on as soon as its device has the value. All else that its step needs is known before:
which program, from which segment on, what its tables and inputs must hold. So it is prepared when the user asks for the
value, and what is left to do when the run goes on is one message and one graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from djinn_fx.runtime.graphs import Replayed, Runnable
from djinn_fx.runtime.lanes import Lanes, Written
from djinn_fx.runtime.launch import Launch, Seat
from djinn_fx.runtime.remainder import Beginnings
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site

#: Bytes that a value taken over in a message is a multiple of, and where it begins.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Way:
    """How a step that ran runs again with another value of a site.

    Attributes:
        begin: the segment to begin with.
        place: where the value goes, and what was there before it: ``[1, *feature_shape]``.
        plan: what the lane's tables must hold.
    """

    begin: int
    place: torch.Tensor
    plan: Written


@dataclass(frozen=True, eq=False)
class Poised:
    """A step that ran, and what it takes to run it again from one site on.

    Attributes:
        launch: what ran it; as long as it is the last one, all else here holds.
        seat: the seat of the edited step in the launch to come.
        step: the step that ran.
        replayed: the program.
        now: what the lane's tables hold.
        way: with the value in the lane's tap, to be injected; the whole step can be run so too.
        short: with the value in the place of what the site's segment made, if it makes nothing else; it is not run.
        own: what the edited step has as its value; not written yet.
        numbers: token, position, arena row and length, by lane.
    """

    launch: Launch
    seat: Seat
    step: Step
    replayed: Replayed
    now: Written
    way: Way
    short: Way | None
    own: torch.Tensor
    numbers: Mapping[int, tuple[int, int, int, int]]

    @property
    def edited(self) -> Step:
        """The edited step."""
        return self.seat.row.step

    def ready(self) -> tuple[Way, Runnable]:
        """The shortest way that is ready, and what runs it."""
        way = self.short or self.way
        part = self.replayed.part(way.begin)
        return (self.way if part is self.replayed.step else way), part


def poised(
    launch: Launch,
    replayed: Replayed,
    lanes: Lanes,
    row: BatchRow,
    site: Site,
    number: int,
    beginnings: Beginnings,
) -> Poised | None:
    """Make a step ready to run again with another value of a site; None where a message cannot bring the value.

    Args:
        launch: what ran it, and nothing else.
        replayed: the program.
        lanes: the buffers.
        row: the step as it is.
        site: the site.
        number: of the launch to come.
        beginnings: where programs may begin.
    """
    ((lane, seat),) = launch.rows.items()
    index, step = lanes.index_of(site), row.step
    if index is None or seat.row.arena_row != row.arena_row or len(step.steering) > 1:
        return None
    place, now = lanes.tap(index)[lane : lane + 1], lanes.written[lane]
    if not aligned(place):
        return None
    own = torch.empty_like(place)
    again = Seat(BatchRow(row.arena_row, step.edited(site.name, own), row.wants), lane, number)
    numbers = {lane: (step.tokens[0], step.start, row.arena_row, step.stop)}
    # What was injected before lies in its taps, whichever way it came there.
    plan = now.with_injected(index, *lanes.injected(step.injections))
    way = Way(beginnings.segment(replayed.program, index), place, plan)
    short = _short(replayed, lane, site, place, now)
    return Poised(launch, again, step, replayed, now, way, short, own, numbers)


def _short(replayed: Replayed, lane: int, site: Site, tap: torch.Tensor, now: Written) -> Way | None:
    """The way that replaces what a site's segment made in a lane."""
    found = replayed.behind(site)
    if found is None:
        return None
    begin, made = found
    place = made[lane : lane + 1]
    alike = place.dtype == tap.dtype and place.nbytes == tap.nbytes and aligned(place)
    return Way(begin, place, now) if alike else None


def aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be taken over in a message."""
    return not (tensor.data_ptr() % ALIGNMENT or tensor.nbytes % ALIGNMENT) and tensor.is_contiguous()
