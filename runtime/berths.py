"""A session leaves its row, and comes back to one.

At every moment its KV lies whole where the session says that it does: an error or an interrupt (Ctrl-C) in the middle
of a move costs a move, and nobody's bits. The caller holds the engine's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from djinn_fx.runtime.parcels import Parked
from djinn_fx.runtime.scarce import memory_for
from djinn_fx.runtime.tables import BatchRow

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.session import Session


def park(engine: Engine, session: Session, *, beyond: bool = False) -> None:
    """Move a session's KV to the host memory that is free now and free its row; on CUDA both are only begun.

    Args:
        engine: of the session.
        session: on the device.
        beyond: into ordinary memory, which no budget counts.

    Raises:
        CapacityError: there is no memory; the session stays where it is.
    """
    row = session.row
    with memory_for("a session that moves off the device"):
        sent = engine.transfer.send(row, session.extent, beyond=beyond)
    engine.drop_ahead(row)
    try:
        session.host = sent.parked
        engine.transfer.leave(row)  # not before: until here its KV was that in the row
    finally:
        if session.host is not None:
            engine.arena.vacated(row)
    engine.tiers.expect(session)


def seat(engine: Engine, session: Session, host: Parked) -> None:
    """Begin to copy a session's KV into a free row.

    Raises:
        CapacityError: no row is free, or no memory; the session stays where it is.
    """
    row = engine.arena.take()[0]
    try:
        with memory_for("a session that comes back to the device"):
            engine.transfer.receive(host, row)
        session.row, session.host = row, None
    except BaseException:
        if session.host is not None:
            engine.vacate(row)
        raise
    refresh(engine, session)


def refresh(engine: Engine, session: Session) -> None:
    """Tell a prompt chunk in the air that its session has another row now."""
    flight = None if session.run is None else session.run.flight
    if flight is not None and flight.chunk is not None:
        engine.executor.refresh(flight.chunk, BatchRow(session.row, flight.step))
