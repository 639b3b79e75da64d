"""Checkpoints: a session's whole state and its KV, in host memory or in a file, restorable any number of times."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from djinn_fx.errors import CheckpointError, DjinnError, InvalidValue, SessionClosed
from djinn_fx.runtime.breakpoints import arm_breakpoints
from djinn_fx.runtime.checkpoint_file import read_file, write_file
from djinn_fx.runtime.codec import Decoder, Encoder
from djinn_fx.runtime.disk import Filed
from djinn_fx.runtime.fingerprint import (
    Identity,
    describe_environment,
    describe_model,
    environment_differences,
    fingerprint,
    model_differences,
    weight_differences,
)
from djinn_fx.runtime.parcels import Parked, Sent, fetch
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.restore import fill, require_fit
from djinn_fx.runtime.saved import Saved
from djinn_fx.runtime.scarce import lacks_memory, memory_for, no_memory
from djinn_fx.runtime.snapshot import SessionState, Snapshot, snapshot
from djinn_fx.sites import SiteTable
from djinn_fx.specs import Breakpoint

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.plain import Plain, Predicate
    from djinn_fx.runtime.session import Session


@dataclass(frozen=True, eq=False)
class Contents:
    """A checkpoint as plain data.

    Attributes:
        session: JSON-able.
        tensors: on the CPU; from a file also the KV, under its arena names.
        functions: users' predicates, which a file cannot hold.
    """

    session: Plain
    tensors: Mapping[str, torch.Tensor]
    functions: Mapping[str, Predicate]


class Pending(NamedTuple):
    """A checkpoint just taken: nobody has looked at it yet, and its copies may be under way.

    Attributes:
        taken: the session, but for its KV.
        sent: the copies.
        table: the sites that orders speak of.
        pool: host memory for what is still on the device.
    """

    taken: Snapshot
    sent: Sent
    table: SiteTable
    pool: HostPool

    def contents(self) -> Contents:
        """Wait for the copies and write everything down; what is still on the device is copied now."""
        if self.sent.arrived is not None:
            self.sent.arrived.synchronize()
        encoder = Encoder({site.order: site.name for site in self.table.sites})
        encoded = encoder.session(self.taken.settled(self.sent.extra))
        return Contents(encoded, fetch(encoder.tensors, self.pool), encoder.functions)


class Kept(NamedTuple):
    """KV that was sent: the first ``length`` positions of what is parked, under ``names``."""

    parked: Parked | Filed
    length: int
    names: tuple[str, ...]

    def in_memory(self) -> Parked:
        """The KV, read from the disk if its session lay there."""
        return self.parked if isinstance(self.parked, Parked) else self.parked.read(None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By arena name, ``[heads, length, dim]``; views."""
        return dict(zip(self.names, self.parked.tensors(self.length), strict=True))


class Checkpoint:
    """A session at one moment: ``stop.checkpoint()`` and ``session.checkpoint()`` make one.

    It lives in host memory, is independent of what its session does later, and can be restored any number of times
    with ``dj.restore``, after the session was closed too; :meth:`save` puts it on disk. Its memory is free again once
    nothing refers to it. It keeps the model's weights alive, because :meth:`save` writes their fingerprint. Its copies
    may be under way at first: whatever looks into it (``nbytes``, ``repr``, saving, restoring) waits for them.
    """

    def __init__(
        self,
        origin: Mapping[str, Plain],
        held: Pending | Contents,
        kv: Kept | None = None,
        identity: Identity | None = None,
    ) -> None:
        """Made by :func:`take_checkpoint` and :meth:`load`.

        Args:
            origin: JSON-able: ``model``, ``environment`` and, from a file, ``weights``.
            held: the session.
            kv: its KV; None from a file, whose tensors hold it.
            identity: the model it was taken from; None from a file.
        """
        self._origin, self._held, self._kv, self._identity = origin, held, kv, identity
        self._lock = threading.Lock()

    def _contents(self) -> Contents:
        with self._lock, memory_for("a checkpoint"):
            if isinstance(self._held, Pending):
                self._held = self._held.contents()
            return self._held

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in host memory; waits as :meth:`wait`."""
        kv = 0 if self._kv is None else self._kv.parked.nbytes
        return kv + sum(tensor.nbytes for tensor in self._contents().tensors.values())

    def wait(self) -> Checkpoint:
        """Wait until every byte of it is in host memory; returns the checkpoint itself.

        KV and the stop's value are on their way from the start. What the session's history shares with the checkpoint
        (edits, injected and captured values) is fetched now.
        """
        self._contents()
        return self

    def save(self, path: str | os.PathLike[str]) -> Path | str:
        """Write it, with the fingerprint of the weights as they are now, whole or not at all.

        Any address of fsspec will do, such as ``memory://name``; see docs/checkpoints.md for what is whole there.
        Decoding goes on meanwhile: nothing here takes the engine's lock.

        A breakpoint whose ``when=`` is a function of your own is left out, with a warning.

        Returns:
            what ``dj.restore`` takes: the path of a local file, the address of any other.

        Raises:
            CheckpointError: the file could not be written; nothing changed under the name.
        """
        return self.write(path, self._weights())

    def write(self, path: str | os.PathLike[str], weights: Mapping[str, str]) -> Path | str:
        """:meth:`save` with a fingerprint of the weights that is known already."""
        contents = self._contents()
        document = {**self._origin, "session": _portable(contents.session), "weights": dict(weights)}
        kv = {} if self._kv is None else self._kv.tensors()
        return write_file(path, document, {**contents.tensors, **kv})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Checkpoint:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: not readable, cut off, damaged, not a checkpoint, or of another format.
        """
        document, tensors = read_file(path)
        session = document.pop("session", {})
        return Checkpoint(document, Contents(session, tensors, {}))

    def restore_into(
        self,
        engine: Engine,
        *,
        breakpoints: Iterable[str | Breakpoint] = (),
        exact: bool = True,
        saved: Saved | None = None,
    ) -> Session:
        """Bring it back as a new session; ``session.run`` stands where it stood.

        Args:
            engine: of the same model.
            breakpoints: more breakpoints for the restored run, beside its own.
            exact: refuse an environment in which the run would go on with other bits.
            saved: the file it was recovered from; the caller settles the session.

        Raises:
            CheckpointError: another model, or, with ``exact``, another environment.
            SiteNotCompiled: a site at which it stops, steers or captures is not compiled in.
            CapacityError: no row is free, or the session is longer than ``max_length``; nothing changed.
            InvalidPredicate, UnknownSite, SessionClosed, InvalidValue.
        """
        if engine.closed:
            raise SessionClosed("cannot restore: this compiled model was closed; compile it again.")
        self._require_model(engine)
        with memory_for("a restored session"):
            contents = self._contents()
            state = _decode(contents, engine)
        require_fit(engine, state)
        if exact:
            self._require_environment(engine)
        more = arm_breakpoints(breakpoints, engine.table, engine.sites, engine.dtype, engine.device)
        if more and state.run is None:
            raise InvalidValue("this checkpoint holds no run to give breakpoints= to; give them to the next call.")
        parked = None if self._kv is None else self._kv.in_memory()

        def act() -> Session:
            session = engine.seated_session(state.seed)
            session.saved, session.settled = saved, saved is None
            try:
                with memory_for("a restored session"):
                    engine.arena.arrive(session.row)
                    if parked is None:
                        engine.arena.write(session.row, [contents.tensors[name] for name in engine.arena.env])
                    else:
                        engine.transfer.receive(parked, session.row)
                        engine.arena.arrive(session.row)
                    fill(session, state, more, exact)
            except BaseException:
                session.close()
                raise
            return session

        return engine.tiers.roomy(act)

    def _weights(self) -> dict[str, str]:
        """The fingerprint of the weights it belongs to."""
        if self._identity is not None:
            return fingerprint(self._identity.weights)
        saved: dict[str, str] = self._origin["weights"]
        return saved

    def _require_model(self, engine: Engine) -> None:
        found = model_differences(self._origin["model"], describe_model(engine))
        if not found and self._identity is not engine.identity:
            found = weight_differences(self._weights(), fingerprint(engine.identity.weights))
        if found:
            raise CheckpointError(
                f"this checkpoint belongs to another model: {'; '.join(found)}. Restore it into the model it was taken "
                "from; exact=False does not help here."
            )

    def _require_environment(self, engine: Engine) -> None:
        found = environment_differences(self._origin["environment"], describe_environment(engine))
        if found:
            raise CheckpointError(
                f"this checkpoint was taken in another environment: {'; '.join(found)}. The run would go on with other "
                "bits. Restore it in the same environment, or pass exact=False to accept other bits."
            )

    def __repr__(self) -> str:
        session = self._contents().session
        run = session["run"]
        stop = run and run["flight"] and run["flight"]["stop"]
        at = f", stopped at {stop['site']!r}" if stop else ""
        return f"Checkpoint({len(session['tokens'])} tokens{at}, {self.nbytes} bytes)"


def take_checkpoint(session: Session, *, between: bool = False, beyond: bool = False) -> Checkpoint:
    """A checkpoint of a session as it stands; the caller holds the engine's lock.

    On CUDA its copies are only begun, in the order of the current stream, and nothing is written down yet.

    Args:
        session: of which.
        between: also between two steps of a run that is being driven.
        beyond: in ordinary memory that no budget counts.

    Raises:
        SessionBusy: the session's run is being driven just now.
        CapacityError: no host memory is left.
    """
    engine = session.engine
    row = session.row if session.host is None else None  # nothing writes into what was offloaded: it is shared
    try:
        taken, value, copy = snapshot(session, between=between)
        sent = engine.transfer.send(row, session.length, value, copy=copy, beyond=beyond)
    except (MemoryError, RuntimeError) as error:  # by hand: as a context it costs more
        if not lacks_memory(error):
            raise
        raise no_memory(error, "a checkpoint") from error
    parked = session.host or sent.parked
    assert parked is not None
    kept = Kept(parked, session.length, engine.arena.names)
    return Checkpoint(engine.described(), Pending(taken, sent, engine.table, engine.pool), kept, engine.identity)


def _portable(session: Plain) -> Plain:
    """The session without what a file cannot hold."""
    run = session["run"]
    if run is None:
        return session
    kept = []
    for point in run["breakpoints"]:
        if "function" in (point["when"] or {}):
            warnings.warn(
                f"the breakpoint at {point['site']!r} is not saved: its when= is a function of your own, which a "
                "file cannot hold. Give it again: dj.restore(path, breakpoints=[...]).",
                stacklevel=4,
            )
        else:
            kept.append(point)
    return {**session, "run": {**run, "breakpoints": kept}}


def _decode(contents: Contents, engine: Engine) -> SessionState:
    decoder = Decoder(
        contents.tensors,
        contents.functions,
        engine.device,
        orders=lambda name: engine.table.get(name).order,
        fresh_key=engine.next_key,
    )
    try:
        return decoder.session(contents.session)
    except DjinnError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"this checkpoint holds no session that can be read ({type(error).__name__}: {error}). Take it again."
        ) from error
