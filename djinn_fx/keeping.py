"""What a compiled model keeps: checkpoints brought back, autosave, and where memory went."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from djinn_fx.errors import InvalidValue
from djinn_fx.making import weight_bytes
from djinn_fx.runtime.autosave import Autosave, recover
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.checkpoint_file import is_url, local
from djinn_fx.runtime.engine import Engine
from djinn_fx.runtime.observe import Observer
from djinn_fx.runtime.residence import Memory, Place
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.streaming import Weights
from djinn_fx.specs import Breakpoint


class Keeping:
    """The part of :class:`djinn_fx.Dj` that keeps sessions."""

    engine: Engine
    observer: Observer
    _weights: Weights | None

    def _alive(self) -> None:
        raise NotImplementedError

    def restore(
        self,
        checkpoint: Any,
        breakpoints: Iterable[str | Breakpoint] = (),
        exact: bool = True,
    ) -> Session:
        """Bring a checkpoint (a path or a :class:`Checkpoint`) back as a session.

        Its run, if it had one, is ``session.run``; a run that stood at a stop stands there again.

        Raises:
            CheckpointError: damaged, of another model, or (with ``exact``) of another environment.
            CapacityError, SiteNotCompiled.
            InvalidValue: neither a checkpoint nor where one is.
        """
        self._alive()
        if not isinstance(checkpoint, Checkpoint | str | os.PathLike):
            raise InvalidValue(
                f"dj.restore takes a Checkpoint, or the path or address that its save() returned, got "
                f"{type(checkpoint).__name__}. A stop or a session gives one: stop.checkpoint()."
            )
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.load(checkpoint)
        return loaded.restore_into(self.engine, breakpoints=breakpoints, exact=exact)

    def autosave(self, folder: str | os.PathLike[str], every: float = 30.0) -> Autosave:
        """Keep all sessions in a folder, in the background; :meth:`recover` brings them back. See docs/checkpoints.md.

        Args:
            folder: made if it is not there.
            every: seconds between two rounds: what a crash loses at most, beside the time a round takes.

        Returns:
            a handle with ``stop()`` and ``save_now()``; also a context manager.

        Raises:
            CheckpointError: the folder cannot be made.
            InvalidValue: an address, or no number of seconds.
        """
        self._alive()
        return Autosave(self.engine, _local(folder), every)

    def recover(self, folder: str | os.PathLike[str], exact: bool = True) -> list[Session]:
        """Every session that :meth:`autosave` left in a folder; all or none. None where there is no folder yet.

        Raises:
            As :meth:`restore`; InvalidValue for an address.
        """
        self._alive()
        return recover(self.engine, _local(folder), exact)

    def memory(self) -> Memory:
        """Bytes by component.

        Returns:
            on the device ``weights`` (with the room for those that stream), ``kv`` (the arena), ``kv_used`` (of it,
            positions that hold something), ``buffers`` (what compiled steps read and leave behind) and ``staging`` (for
            copies to the host); on the host ``weights_streamed``, ``host`` (KV of sessions there), ``pinned_used``
            (that, and checkpoints in memory),
            ``pinned_capacity`` (all slabs) and its bound ``pinned_budget``, ``values`` (pinned for what
            ``run_with_cache(device="cpu")`` brings); ``disk`` and its bound ``disk_budget``.
            The attribute ``sessions`` of what is returned tells the same by session.
        """
        engine = self.engine
        with engine.lock:
            per_position = engine.arena.bytes_per_position
            places = tuple(
                Place(s, s.tier, per_position * s.extent if s.host is None else s.host.nbytes, s.pinned, s.idle_hint)
                for s in engine.sessions
            )
            found = {
                **weight_bytes(engine.identity.weights, self._weights),
                "kv": engine.arena.nbytes,
                "kv_used": sum(per_position * session.extent for session in engine.sessions if session.resident),
                "buffers": engine.buffer_bytes,
                "staging": engine.transfer.staging_bytes,
                "host": sum(place.nbytes for place in places if place.tier == "host"),
                "pinned_used": engine.pool.used,
                "pinned_capacity": engine.pool.capacity,
                "pinned_budget": engine.pool.limit,
                "values": self.observer.values.capacity,
                "disk": engine.tiers.disk.used,
                "disk_budget": engine.tiers.disk.limit,
            }
            return Memory(found, places)


def _local(folder: str | os.PathLike[str]) -> Path:
    if is_url(folder):
        raise InvalidValue(
            f"{os.fspath(folder)!r} is an address: autosave keeps sessions in a local folder. Mount it there, or save "
            "checkpoints yourself: stop.checkpoint().save(address) takes any."
        )
    return local(folder)
