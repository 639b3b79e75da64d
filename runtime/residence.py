"""Residence: where a session's KV lies, and what its user may say about that."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from djinn_fx.errors import InvalidValue
from djinn_fx.notebook import Shown
from djinn_fx.runtime import showing
from djinn_fx.runtime.alarm import Alarm
from djinn_fx.views import View

if TYPE_CHECKING:
    from djinn_fx.runtime.disk import Filed
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.parcels import Parked
    from djinn_fx.runtime.run import Run
    from djinn_fx.runtime.session import Session


@dataclass(frozen=True)
class Place:
    """Where one session's KV lies.

    Attributes:
        session: whose.
        tier: ``"device"``, ``"host"`` or ``"disk"``.
        nbytes: how much it is.
        pinned: whether it stays on the device.
        idle_hint: as the user set it.
    """

    session: Residence
    tier: Literal["device", "host", "disk"]
    nbytes: int
    pinned: bool
    idle_hint: float | None


class Memory(Shown, dict[str, int]):
    """Bytes by component; :attr:`sessions` tells where each session lies."""

    def __init__(self, components: Mapping[str, int], sessions: tuple[Place, ...]) -> None:
        super().__init__(components)
        self.sessions = sessions

    def describe(self) -> View:
        """Bytes by component and by session; notebooks show it."""
        return showing.memory_view(self, [(place.tier, place.nbytes) for place in self.sessions])


class Residence:
    """The part of a session that has a place.

    Attributes:
        engine: whose arena it is.
        row: of the arena, while the KV lies on the device.
        host: the KV, while it does not.
        pinned: whether it stays on the device.
        paused_at: when it was last acted on, by the monotonic clock.
        away: brings it back when its user is expected.
    """

    length: int
    closed: bool
    _run: Run | None

    def __init__(self, engine: Engine, row: int) -> None:
        self.engine, self.row = engine, row
        self.host: Parked | Filed | None = None
        self.pinned = False
        self.paused_at = time.monotonic()
        self.away: Alarm | None = None
        self._idle_hint: float | None = None

    def require_open(self) -> None:
        """Raise :class:`SessionClosed` if the session was closed."""
        raise NotImplementedError

    @property
    def _itself(self) -> Session:
        raise NotImplementedError

    def require_still(self) -> None:
        """Raise :class:`SessionBusy` while a thread is driving the session's run."""
        raise NotImplementedError

    @property
    def resident(self) -> bool:
        """Whether the session's KV is on the device."""
        return not self.closed and self.host is None

    @property
    def tier(self) -> Literal["device", "host", "disk"]:
        """Where the session's KV lies."""
        return "device" if self.host is None else "host" if self.host.in_memory else "disk"

    @property
    def extent(self) -> int:
        """Number of positions whose KV was written, a step in the air included."""
        flight = self._run.flight if self._run is not None else None
        return self.length if flight is None else max(self.length, flight.step.stop)

    def offload(self) -> None:
        """Move the session's KV to host memory and free its row; it returns by itself when it goes on.

        Sessions move by themselves where rows run out. On CUDA the call returns at once.

        Raises:
            SessionClosed: it was closed.
            InvalidValue: it is pinned.
            SessionBusy: a thread is driving its run.
            CapacityError: no host memory is left (``pinned_bytes``); the session stays where it is.
        """

        def act() -> None:
            self.require_open()
            self.require_still()
            if self.pinned:
                raise InvalidValue("this session is pinned to the device; call s.pin(False) first.")
            self.engine.offload(self._itself)

        self.engine.tiers.roomy(act)

    def pin(self, pinned: bool = True) -> None:
        """Keep the session on the device (or, with False, allow it to be moved off).

        Raises:
            CapacityError: it is away and no row can be had.
        """

        def act() -> None:
            self.require_open()
            if pinned:
                self.engine.tiers.bring_back(self._itself)  # whoever uses it first waits for it
            self.pinned = pinned

        self.engine.tiers.roomy(act)

    @property
    def idle_hint(self) -> float | None:
        """Seconds from the last act on until the user expects to be back; None: unknown. See ``docs/tiers.md``."""
        return self._idle_hint

    @idle_hint.setter
    def idle_hint(self, seconds: float | None) -> None:
        wanted: Any = seconds
        if wanted is not None and not (isinstance(wanted, Real) and 0 <= float(wanted) < threading.TIMEOUT_MAX):
            raise InvalidValue(f"idle_hint={seconds!r}: give seconds, 0 or more, or None.")
        with self.engine.lock:
            self.require_open()
            self._idle_hint, self.paused_at = seconds, time.monotonic()
            self.engine.tiers.expect(self._itself)

    def returned(self) -> None:
        """Its user is back; the caller holds the engine's lock."""
        self._idle_hint, self.paused_at = None, time.monotonic()
