"""Poised steps: a decode step at a stop, ready to run on with another value there.

A run that somebody edits goes on as soon as its device has the value. All else that its step needs is known before:
which program, from which segment on, what its tables and inputs must hold. So it is prepared when the user asks for the
value, and what is left to do when the run goes on is one message and one graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from djinn_fx.runtime.graphs import Replayed
from djinn_fx.runtime.lanes import Lanes, Written
from djinn_fx.runtime.launch import Launch, Seat
from djinn_fx.runtime.remainder import Beginnings
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site

#: Bytes that a value taken over in a message is a multiple of, and where it begins.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Poised:
    """A step that ran, and what it takes to run it again from one site on.

    Attributes:
        launch: what ran it; as long as it is the last one, all else here holds.
        seat: the seat of the edited step in the launch to come.
        step: the step that ran.
        replayed: the program.
        begin: the segment to begin with.
        now: what the lane's tables hold.
        plan: what they must hold.
        place: the lane's tap of the site, ``[1, *feature_shape]``.
        own: what the edited step has as its value; not written yet.
        numbers: token, position, arena row and length, by lane.
    """

    launch: Launch
    seat: Seat
    step: Step
    replayed: Replayed
    begin: int
    now: Written
    plan: Written
    place: torch.Tensor
    own: torch.Tensor
    numbers: Mapping[int, tuple[int, int, int, int]]

    @property
    def edited(self) -> Step:
        """The edited step."""
        return self.seat.row.step


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
    begin = beginnings.segment(replayed.program, index)
    return Poised(launch, again, step, replayed, begin, now, now.with_injected(index), place, own, numbers)


def aligned(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be taken over in a message."""
    return not (tensor.data_ptr() % ALIGNMENT or tensor.nbytes % ALIGNMENT) and tensor.is_contiguous()
