"""What a session must be: its script so far, where its run stands, and what each act of a user does to both.

:class:`Shadow` follows one session without looking at it. What a call computes it asks the oracle, from the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from djinn_fx.sites import Site
from djinn_fx.specs import Breakpoint, Edit
from tests.bits import same_bits
from tests.oracle import Call, Change, Oracle, Place, Played, Script, Step


@dataclass(frozen=True)
class World:
    """What all sessions of one compiled model share; ``sites`` are those compiled now."""

    oracle: Oracle
    rows: int
    sites: tuple[Site, ...]

    def order(self, site: str) -> int:
        """Rank of a site; compiled or not."""
        return self.oracle.table.get(site).order


@dataclass(frozen=True, eq=False)
class Point:
    """A breakpoint in force: the sites it stood for when it was given, and the stops it may still make."""

    spec: Breakpoint
    sites: frozenset[str]
    left: int | None


@dataclass(frozen=True)
class Target:
    """Where ``stop.step`` goes: the step by its index, the first site of at least this order."""

    step: int
    order: int


@dataclass(eq=False)
class Shadow:
    """One session as it must be.

    Attributes:
        script: how it came to be.
        points: breakpoints of its newest run.
        at: the place of the stop at which the run stands; or None.
        pause: an unfinished run that does not stand at a stop: positions computed, tokens known; or None.
        fired: of the stop.
        capture: sites that the newest run captures.
        played: the script, played to where it stands; None when something changed.
    """

    script: Script = field(default_factory=Script)
    points: list[Point] = field(default_factory=list)
    at: Place | None = None
    pause: tuple[int, int] | None = None
    fired: tuple[int, ...] = ()
    capture: tuple[str, ...] = ()
    played: Played | None = None

    # -- where it stands -----------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether its run is unfinished."""
        return self.at is not None or self.pause is not None

    def look(self, world: World) -> Played:
        """The session as it stands."""
        if self.played is None:
            at = self.at
            watch = None if at is None else lambda step, site, _: bool((step.start, site.order) == at)
            self.played = self._play(world, watch)
            assert (self.played.stop is not None, self.played.paused) == (at is not None, self.pause is not None)
        return self.played

    def value(self, world: World) -> Tensor:
        """What the stop shows."""
        stop = self.look(world).stop
        assert stop is not None
        step, site, value = stop
        return self.script.values.get((step.start, site.name), value)

    def steering(self) -> dict[str, tuple[Edit, int]]:
        """The edits in force and their keys, by site."""
        last = {change.site: change for change in self.script.changes}
        return {site: (change.edit, change.key) for site, change in last.items() if change.edit is not None}

    def _play(self, world: World, watch: Callable[[Step, Site, Tensor], bool] | None) -> Played:
        return world.oracle.play(self.script, world.sites, rows=world.rows, pause=self.pause, watch=watch)

    # -- going on ------------------------------------------------------------------------------

    def begin(self, world: World, call: Call, points: Sequence[Point], capture: Sequence[str]) -> None:
        """A new call, not begun yet."""
        now = self.look(world)
        self.script = replace(self.script, calls=(*self.script.calls, call))
        self.points, self.at, self.capture = list(points), None, tuple(capture)
        self.pause, self.played = (now.length, len(now.tokens) + len(call.tokens)), None

    def advance(self, world: World) -> Played:
        """To the next stop that a breakpoint makes, or to the end."""
        self._go(world, lambda *seen: bool(self._hits(*seen)))
        stop = self.look(world).stop
        if stop is not None:
            hits = self._hits(*stop)
            self.fired = tuple(sorted({place for places in hits.values() for place in places}))
            for index in hits:
                point = self.points[index]
                self.points[index] = replace(point, left=None if point.left is None else point.left - 1)
        return self.look(world)

    def _hits(self, step: Step, site: Site, value: Tensor) -> dict[int, tuple[int, ...]]:
        """The breakpoints that hold, and where."""
        return {
            index: places
            for index, point in enumerate(self.points)
            if site.name in point.sites and point.left != 0 and (places := fired(point.spec, step, site, value))
        }

    def to_target(self, world: World, target: Target) -> Played:
        """To a place, passing over breakpoints; or to the end."""
        self._go(world, lambda step, site, _: step.index == target.step and site.order >= target.order)
        self.fired = ()
        return self.look(world)

    def to_next(self, world: World) -> Played:
        """To the next site of all; or to the end."""
        self._go(world, lambda *_: True)
        self.fired = ()
        return self.look(world)

    def to_end(self, world: World) -> Played:
        """To the end, passing over breakpoints."""
        self._go(world, lambda *_: False)
        return self.look(world)

    def paused_at(self, world: World, length: int, known: int) -> None:
        """The run was seen to stand between two steps: there must have been nothing to stop at on the way."""
        self._go(world, lambda *seen: bool(self._hits(*seen)), (length, known))
        assert self.look(world).paused, f"the run should have stopped at {self.at}"

    def _go(
        self, world: World, watch: Callable[[Step, Site, Tensor], bool], pause: tuple[int, int] | None = None
    ) -> None:
        here = self.at if self.pause is None else (self.pause[0], -1)
        assert here is not None
        self.pause = pause
        self.played = self._play(world, lambda *seen: (seen[0].start, seen[1].order) > here and watch(*seen))
        stop = self.played.stop
        self.at = None if stop is None else (stop[0].start, stop[1].order)

    # -- acts ----------------------------------------------------------------------------------

    def write(self, world: World, value: Tensor) -> None:
        """The user changed ``stop.value`` to this; what has the bits it had is no change."""
        now = self.look(world)
        assert now.stop is not None
        step, site, natural = now.stop
        values = {**self.script.values}
        values.pop((step.start, site.name), None)
        if not same_bits(value, natural):
            values[step.start, site.name] = value.clone()
        self.script = replace(self.script, values=values)

    def steer(self, world: World, site: str, edit: Edit | None, key: int) -> None:
        """Steering from here on."""
        place = self.at or (self.look(world).length, -1)
        self.script = replace(self.script, changes=(*self.script.changes, Change(place, site, edit, key)))

    def recompute(self, world: World, site: str, edit: Edit, key: int) -> None:
        """Steering as if it had always acted; tokens stay."""
        now = self.look(world)
        others = tuple(change for change in self.script.changes if change.site != site)
        forced = {at: token for at, token in enumerate(now.tokens) if now.sampled[at]}
        self.script = replace(self.script, changes=(Change((0, -1), site, edit, key), *others), forced=forced)
        self.played = None

    def rewind(self, world: World, position: int, site: Site) -> Played:
        """Back to the step that covers a position, stopped after a site."""
        now = self.look(world)
        (step,) = [step for step in now.steps[now.first :] if step.start <= position < step.stop]
        self.at, self.pause, self.fired = (step.start, site.order), None, ()
        self._forget(world, self.at, max(now.span[1], step.stop))
        return self.look(world)

    def close_run(self, world: World) -> None:
        """Abandon the run."""
        now = self.look(world)
        length = now.length
        kept = length + int(length < len(now.tokens) and now.sampled[length])
        self._forget(world, (length + 1, -1), kept)
        changes = tuple(replace(c, place=min(c.place, (length, -1))) for c in self.script.changes)
        values = {key: value for key, value in self.script.values.items() if key[0] < length}
        *calls, last = self.script.calls
        cut = replace(last, cut=(length, kept))
        self.script = replace(self.script, calls=(*calls, cut), changes=changes, values=values)
        self.at = self.pause = None

    def _forget(self, world: World, place: Place, known: int) -> None:
        """Drop what lies at a place or behind it, and tokens from ``known`` on."""
        script = self.script
        *seeds, (first, last) = script.seeds
        self.script = replace(
            script,
            values={key: v for key, v in script.values.items() if (key[0], world.order(key[1])) < place},
            changes=tuple(change for change in script.changes if change.place < place),
            forced={at: token for at, token in script.forced.items() if at < known},
            seeds=(*(pair for pair in seeds if pair[0] < min(first, known)), (min(first, known), last)),
        )
        self.played = None

    def fork(self, world: World, seed: int | None) -> Shadow:
        """A copy, without breakpoints, that draws with another seed from here on."""
        now = self.look(world)
        script = self.script
        if seed is not None:
            script = replace(script, seeds=(*script.seeds, (len(now.tokens), seed)))
        return replace(self, script=script, points=[])

    def copy(self) -> Shadow:
        """A copy, breakpoints too."""
        return replace(self, points=list(self.points))

    def describe(self) -> str:
        """The script, to read."""
        lines = [f"  {call}" for call in self.script.calls]
        lines += [
            f"  steering from {change.place}: {change.site} {show(change.edit)}" for change in self.script.changes
        ]
        lines += [f"  value put at {key}: {tuple(value.shape)}" for key, value in self.script.values.items()]
        lines += [f"  seeds {self.script.seeds}, forced {dict(self.script.forced)}"]
        lines += [f"  {point.spec} left {point.left}" for point in self.points]
        return "\n".join([*lines, f"  stands at {self.at or self.pause}"])


def fired(spec: Breakpoint, step: Step, site: Site, value: Tensor) -> tuple[int, ...]:
    """Positions of a step at which a breakpoint holds, looked at one by one."""
    found = []
    for row, (at, chosen) in enumerate(zip(step.positions(site), step.chosen(spec.positions, site), strict=True)):
        when = spec.when
        seen = torch.tensor(step.tokens[at - step.start]) if getattr(when, "reads_token", False) else value[row]
        if chosen and (when is None or bool(when(seen))):
            found.append(at)
    return tuple(found)


def show(edit: Edit | None) -> str:
    """An edit in a line."""
    if edit is None:
        return "ends"
    parts: Mapping[str, object] = vars(edit)
    words = [f"{name}={tuple(p.shape) if isinstance(p, Tensor) else p}" for name, p in parts.items() if p is not None]
    return ", ".join(words)
