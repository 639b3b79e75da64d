"""A decode step that runs again need not begin at its beginning.

At a stop in a decode step the step has run to its end. Where the user changes something, it runs again with the change
in its tables. What lies before the first table that changed would come to what it came to, so it is left out: what its
segments made is still in the static buffers, and their keys and values are in the arena.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from djinn_fx.program import Program
from djinn_fx.runtime.lanes import STALE, Written
from djinn_fx.runtime.launch import Launch, Seat
from djinn_fx.runtime.steps import Step
from djinn_fx.sites import Site


class Beginnings:
    """Where programs may begin.

    Args:
        sites: the compiled sites, in execution order.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._known: dict[
            int, tuple[Program, list[int]]
        ] = {}  # by identity, which holds as long as the program is here

    def begin(
        self,
        program: Program,
        last: Launch,
        rows: Mapping[int, Seat],
        number: int,
        written: Sequence[Written],
        plans: Mapping[int, Written],
    ) -> int:
        """The segment where the last launch, which ``program`` ran, begins to differ from what is wanted; else 0.

        Args:
            program: the program.
            last: the last launch.
            rows: as :func:`first_changed` takes it, like the others.
            number: see there.
            written: see there.
            plans: see there.
        """
        first = first_changed(last, rows, number, written, plans, self._sites) if last.whole else None
        return 0 if first is None else self.segment(program, first)

    def segment(self, program: Program, first: int) -> int:
        """The first segment that takes a table of one site, by its index, or of a later one."""
        if id(program) not in self._known:
            self._known[id(program)] = program, first_segments(program, self._sites)
        return min(self._known[id(program)][1][first:])


def behind(program: Program, site: Site) -> int | None:
    """The segment before which the value of a site may be replaced, all that comes after taking it from there.

    None where no segment hands the value on, or one makes something else of it: hands that on, or writes it to a tap.
    """
    for segment in program.segments[:-1]:
        if site.name in segment.outputs:
            (output,) = segment.graph.graph.find_nodes(op="output")
            value = output.args[0][segment.outputs.index(site.name)]
            alone = [*value.users] == [output] and output.args[0].count(value) == 1
            return segment.index + 1 if alone else None
    return None


def first_segments(program: Program, sites: Sequence[Site]) -> list[int]:
    """For each site, the first segment that takes one of its tables."""
    found: dict[str, int] = {}
    for segment in program.segments:
        for name in segment.inputs:
            found.setdefault(name.rpartition(":")[0], segment.index)
    return [found.get(site.name, 0) for site in sites]


def first_changed(
    last: Launch,
    rows: Mapping[int, Seat],
    number: int,
    written: Sequence[Written],
    plans: Mapping[int, Written],
    sites: Sequence[Site],
) -> int | None:
    """The first site at which a launch differs from the last one; None unless it is that very step again.

    Args:
        last: the last launch.
        rows: the seats of the new one.
        number: its number.
        written: what the lanes' tables held in the last launch.
        plans: what they must hold.
        sites: the compiled sites, in execution order.
    """
    if rows.keys() != last.rows.keys():
        return None
    changed: set[int] = set()
    for lane, seat in rows.items():
        before = last.rows[lane]
        if before.row.arena_row != seat.row.arena_row or before.start(last.number) != seat.start(number):
            return None
        if seat.row.step.tokens[0] != last.fed(before) or written[lane] is STALE:
            return None
        changed.update(_differ(before.row.step, seat.row.step, written[lane], plans[lane], sites))
    return min(changed, default=None)


def _differ(before: Step, now: Step, was: Written, will: Written, sites: Sequence[Site]) -> Iterator[int]:
    """Indices of the sites where one lane is edited or injected into otherwise than it was."""
    if was.edits is not will.edits:
        old, new = was.edits or {}, will.edits or {}
        yield from (index for index in old.keys() | new.keys() if old.get(index) is not new.get(index))
    # Not what the tables held: a value that took the place of what a segment made was in the step alone.
    names = before.injections.keys() | now.injections.keys()
    for index, site in enumerate(sites) if names else ():
        if before.injections.get(site.name) is not now.injections.get(site.name):
            yield index
