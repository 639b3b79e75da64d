"""A session beside its shadow: what the engine made of a script, compared bit for bit with what it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.steering import SteerHandle
from djinn_fx.runtime.stop import Stop
from tests.bits import same_bits
from tests.oracle import Played
from tests.runtime.tiny import assert_same
from tests.session_script import Shadow, World


class Differs(AssertionError):
    """The engine and the oracle disagree; the message holds the script."""


@dataclass(eq=False)
class Against:
    """Something of the engine's that is held against a shadow; ``name`` is for messages."""

    name: str
    shadow: Shadow

    def check_result(self, world: World, result: Result) -> None:
        """Compare the outcome of a finished run, or of one that a breakpoint ended in ``dj.generate``."""
        played = self.shadow.look(world)
        reason = "breakpoint" if self.shadow.at is not None else played.reason
        self.equal("result.tokens", result.tokens.tolist(), played.tokens[played.span[0] :])
        self.equal("result.finish_reason", result.finish_reason, reason)
        steps = [step for step in played.steps[played.first :] if step.logits is not None]
        wanted = list(played.drawn)
        if self.shadow.script.calls[-1].kind == "forward":
            parts = [step.logits[max(0, played.span[0] - step.start) :] for step in steps if step.logits is not None]
            wanted = [row for part in parts for row in part]
        self.equal("result.logits is None", result.logits is None, not wanted)
        if result.logits is not None:
            self.same("result.logits", result.logits, torch.stack(wanted))
        for name in self.shadow.capture:
            if steps:
                self.same(f"captured {name}", result.cache[name], torch.cat([step.values[name] for step in steps]))

    def equal(self, what: str, mine: object, wanted: object) -> None:
        """Fail unless two plain values are equal."""
        if mine != wanted:
            self.fail(f"{what} is {mine}, must be {wanted}")

    def same(self, what: str, mine: Tensor, wanted: Tensor) -> None:
        """Fail unless two tensors have the same bits."""
        mine = mine.detach()
        if not same_bits(mine, wanted):
            shapes = f"{mine.dtype} {tuple(mine.shape)}, must be {wanted.dtype} {tuple(wanted.shape)}"
            if mine.shape == wanted.shape and mine.dtype == wanted.dtype:
                gap = (mine.double() - wanted.double()).abs()
                places = (~((mine == wanted) | (mine.isnan() & wanted.isnan()))).nonzero()[:3].tolist()
                shapes = f"off by up to {gap.nan_to_num(0).max():.3g}, first at {places} of {tuple(mine.shape)}"
            self.fail(f"{what} differs: {shapes}")

    def fail(self, what: str) -> None:
        """Raise with the script so far."""
        raise Differs(f"{self.name}: {what}\n{self.shadow.describe()}")


@dataclass(eq=False)
class Live(Against):
    """One open session.

    Attributes:
        session: the engine's.
        handles: steering handles that it gave, with the shadow's keys.
        stale: stops that its run left, and what they showed last.
        children: its forks.
        unseen: a stop that ``as_stopped`` found and did not yield any more; it is to be handed out next.
    """

    session: Session
    handles: list[tuple[SteerHandle, int]] = field(default_factory=list)
    stale: list[tuple[Stop, Tensor]] = field(default_factory=list)
    children: list[Live] = field(default_factory=list)
    unseen: Stop | None = None

    @property
    def waits(self) -> bool:
        """Whether its run stands at a stop that nobody was given yet."""
        return self.unseen is not None and self.unseen.current

    def take_waiting(self, stop: Stop) -> bool:
        """Whether this is the stop that waited; it does no more."""
        waited, self.unseen = self.waits and self.unseen is stop, None
        return waited

    @property
    def run(self) -> Run:
        """Its newest run."""
        assert self.session.run is not None
        return self.session.run

    @property
    def stop(self) -> Stop:
        """Where its run stands."""
        assert self.run.stop is not None
        return self.run.stop

    def family(self) -> Iterator[Live]:
        """It and the sessions that close with it."""
        yield self
        for child in self.children:
            yield from child.family()

    def check(self, world: World) -> None:
        """Compare all that can be seen of it, and its KV.

        Raises:
            Differs: naming what does.
        """
        played, session = self.shadow.look(world), self.session
        self.equal("tokens", session.tokens.tolist(), played.tokens)
        self.equal("length", session.length, played.length)
        for index, (mine, wanted) in enumerate(zip(self.kv(), played.kv, strict=True)):
            self.same(f"{'kv'[index % 2]} of layer {index // 2}", mine[:, : played.length], wanted)
        self.equal("steering", sorted(session.steering), sorted(self.shadow.steering()))
        for handle, key in self.handles:
            now = self.shadow.steering().get(handle.site)
            self.equal(f"{handle!r}.active", handle.active, now is not None and now[1] == key)
            if now is not None and handle.active:
                self.equal(f"{handle!r}.strength", handle.strength, now[0].strength)
        for stop, shown in self.stale:
            self.equal("stop.current", stop.current, False)
            self.same(f"value of the stale {stop!r}", stop.value, shown)
        if session.run is not None:
            self._check_run(world, played)

    def _check_run(self, world: World, played: Played) -> None:
        run, shadow = self.run, self.shadow
        self.equal("run.tokens", run.tokens.tolist(), played.tokens[played.span[0] :])
        self.equal("run.finished", run.finished, not shadow.busy)
        self.equal("run.finish_reason", run.finish_reason, played.reason)
        self.equal("stands at a stop", run.stop is not None, shadow.at is not None)
        if played.stop is None or shadow.at is None:
            return
        (step, site, _), stop = played.stop, self.stop
        places = step.positions(site)
        self.equal("stop.site", stop.site, site.name)
        self.equal("stop.layer", stop.layer, site.layer)
        self.equal("stop.positions", stop.positions, tuple(places))
        self.equal("stop.position", stop.position, step.stop - 1)
        self.equal("stop.fired", stop.fired, shadow.fired)
        self.equal("stop.phase", stop.phase, "generated" if all(step.sampled) else "prompt")
        self.equal("stop.tokens", stop.tokens.tolist(), played.tokens[: step.stop])
        self.same("stop.value", stop.value, shadow.value(world))

    def kv(self) -> list[Tensor]:
        """Its KV, ``[heads, positions, dim]`` of each layer, wherever it lies."""
        if self.session.host is not None:
            return self.session.host.tensors()
        layers = self.session.engine.arena.layers
        return [tensor[self.session.row] for pair in layers for tensor in pair]

    def leaving(self) -> Callable[[], None]:
        """Remember the stop at which it stands; call what this returns when the run went on."""
        stop = None if self.session.run is None else self.session.run.stop

        def left() -> None:
            if stop is not None and not stop.current:
                self.stale = [*self.stale[-2:], (stop, stop.value.clone())]

        return left


@contextmanager
def nothing_else_changes(
    dj: djinn.Dj, everyone: Sequence[Live], touched: Sequence[Live], unowned: float
) -> Iterator[None]:
    """Fail if an act on some sessions changed another's KV by a bit, lost a row or left one dirty.

    Args:
        dj: whose sessions.
        everyone: all that are open.
        touched: those that may change.
        unowned: what a free row holds.
    """
    arena = dj.engine.arena
    others = [live for live in everyone if live not in touched]
    with dj.engine.lock:
        before = [[tensor[:, : live.session.extent].clone() for tensor in live.kv()] for live in others]
    yield
    settle(dj)
    with dj.engine.lock:
        for live, tensors in zip(others, before, strict=True):
            if not live.session.closed:
                for old, new in zip(tensors, live.kv(), strict=True):
                    live.same("KV that an act on another session changed", new[:, : live.session.extent], old)
        taken = [session.row for session in dj.engine.sessions if session.resident]
        assert len(set(taken)) == len(taken), f"two sessions share a row: {taken}"
        assert arena.free_rows == arena.rows - len(taken), "a row was lost"
        for row in set(range(arena.rows)) - set(taken):
            assert holds(arena, row, unowned), f"free row {row} does not hold {unowned}"


def settle(dj: djinn.Dj) -> None:
    """Wait for sessions whose users are due to come back, and for what the disk has begun."""
    for session in tuple(dj.engine.sessions):
        away = session.away
        if away is not None and away.interval < 1:
            away.join()
    if dj.engine.device.type == "cuda":
        torch.cuda.synchronize()  # the copy stream zeroes the rows that sessions leave


def holds(arena: KVArena, row: int, value: float) -> bool:
    """Whether a row holds nothing but this number, which may be NaN."""
    return all(
        bool((tensor[row].isnan() if value != value else tensor[row] == value).all()) for tensor in arena.env.values()
    )


def check_memory(dj: djinn.Dj) -> None:
    """Fail where ``dj.memory()`` contradicts itself, its budgets or the sessions."""
    memory, engine = dj.memory(), dj.engine
    assert all(count >= 0 for count in memory.values()), memory
    assert memory["kv_used"] <= memory["kv"] and memory["kv"] == engine.arena.nbytes, memory
    assert memory["pinned_used"] <= memory["pinned_capacity"] <= memory["pinned_budget"], memory
    assert memory["disk"] <= memory["disk_budget"], memory
    assert [place.session for place in memory.sessions] == list(dj.sessions)
    places = {tier: [p for p in memory.sessions if p.tier == tier] for tier in ("device", "host", "disk")}
    assert len(places["device"]) == engine.arena.rows - engine.arena.free_rows
    assert memory["kv_used"] == sum(place.nbytes for place in places["device"]), memory
    assert memory["host"] == sum(place.nbytes for place in places["host"]), memory
    assert memory["disk"] >= sum(place.nbytes for place in places["disk"]), memory  # checkpoints may share files
    for place in memory.sessions:
        session = place.session
        assert (place.tier, place.pinned, place.idle_hint) == (session.tier, session.pinned, session.idle_hint)
        least = session.extent * engine.arena.bytes_per_position
        # Away, it is what was sent: a step in the air that was abandoned since counts.
        assert place.nbytes == least or (place.tier != "device" and place.nbytes > least), (place, session.extent)
        assert not place.pinned or place.tier == "device", place


def ended(dj: djinn.Dj, runs: Sequence[Run], wanted: Sequence[Result]) -> None:
    """Bring every run to its end: each comes to what it must be, to the bit, and no row is lost."""
    check_memory(dj)
    for run, result in zip(runs, wanted, strict=True):
        assert_same(run.result(), result)
        run.session.close()
    assert dj.engine.arena.free_rows == dj.engine.arena.rows
