"""Checkpoints: a session's whole state and its KV, in host memory or in a file, restorable any number of times."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import CapacityError, CheckpointError, DjinnError, InvalidValue, SessionClosed
from djinn_fx.runtime import moves
from djinn_fx.runtime.breakpoints import ArmedBreakpoint, arm_breakpoints
from djinn_fx.runtime.checkpoint_file import read_file, write_file
from djinn_fx.runtime.codec import Decoder, Encoder
from djinn_fx.runtime.fingerprint import (
    Identity,
    describe_environment,
    describe_model,
    environment_differences,
    fingerprint,
    model_differences,
    weight_differences,
)
from djinn_fx.runtime.flight import Flight, same_bits
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.snapshot import SessionState, StopState, snapshot
from djinn_fx.runtime.steps import Step
from djinn_fx.sites import require_compiled
from djinn_fx.specs import Breakpoint

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.plain import Plain, Predicate
    from djinn_fx.runtime.session import Session


class Checkpoint:
    """A session at one moment: ``stop.checkpoint()`` and ``session.checkpoint()`` make one.

    It lives in host memory, is independent of what its session does later, and can be restored any number of times,
    after the session was closed too. It keeps the model's weights alive, because :meth:`save` writes their fingerprint.
    """

    def __init__(
        self,
        document: Plain,
        tensors: Mapping[str, torch.Tensor],
        functions: Mapping[str, Predicate],
        identity: Identity | None,
        arrived: torch.cuda.Event | None,
    ) -> None:
        """Made by :func:`take_checkpoint` and :meth:`load`.

        Args:
            document: JSON-able: ``model``, ``environment``, ``session`` and, from a file, ``weights``.
            tensors: on the CPU; the KV under its arena names.
            functions: users' predicates, which a file cannot hold.
            identity: the model it was taken from; None from a file.
            arrived: the copies' event, on CUDA.
        """
        self._document, self._tensors, self._functions = document, tensors, functions
        self._identity, self._arrived = identity, arrived

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in host memory."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def wait(self) -> Checkpoint:
        """Wait until the copies from the device have arrived; returns the checkpoint itself."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it, with the fingerprint of the weights as they are now, whole or not at all; returns the path.

        A breakpoint whose ``when=`` is a function of your own is left out, with a warning.

        Raises:
            CheckpointError: the file could not be written; nothing changed under the name.
        """
        self.wait()
        return write_file(
            path, {**self._document, "session": self._portable(), "weights": self._weights()}, self._tensors
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Checkpoint:
        """Read a file that :meth:`save` wrote.

        Raises:
            CheckpointError: not readable, cut off, damaged, not a checkpoint, or of another format.
        """
        document, tensors = read_file(path)
        return Checkpoint(document, tensors, {}, None, None)

    def restore_into(
        self, engine: Engine, *, breakpoints: Iterable[str | Breakpoint] = (), exact: bool = True
    ) -> Session:
        """Bring it back as a new session; ``session.run`` stands where it stood.

        Args:
            engine: of the same model.
            breakpoints: more breakpoints for the restored run, beside its own.
            exact: refuse an environment in which the run would go on with other bits.

        Raises:
            CheckpointError: another model, or, with ``exact``, another environment.
            SiteNotCompiled: a site at which it stops, steers or captures is not compiled in.
            CapacityError: no row is free, or the session is longer than ``max_length``; nothing changed.
            InvalidPredicate, UnknownSite, SessionClosed, InvalidValue.
        """
        self.wait()
        if engine.closed:
            raise SessionClosed("cannot restore: this compiled model was closed; compile it again.")
        self._require_model(engine)
        state = self._decode(engine)
        _require_fit(engine, state)
        if exact:
            self._require_environment(engine)
        more = arm_breakpoints(breakpoints, engine.table, engine.sites, engine.dtype, engine.device)
        if more and state.run is None:
            raise InvalidValue("this checkpoint holds no run to give breakpoints= to; give them to the next call.")
        with engine.lock:
            session = engine.open_session(state.seed)
            try:
                engine.arena.write(session.row, [self._tensors[name] for name in engine.arena.env])
                _fill(session, state, more, exact)
            except BaseException:
                session.close()
                raise
        return session

    def _decode(self, engine: Engine) -> SessionState:
        decoder = Decoder(
            self._tensors,
            self._functions,
            engine.device,
            orders=lambda name: engine.table.get(name).order,
            fresh_key=engine.next_key,
        )
        try:
            return decoder.session(self._document["session"])
        except DjinnError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"this checkpoint holds no session that can be read ({type(error).__name__}: {error}). Take it again."
            ) from error

    def _portable(self) -> Plain:
        """The session without what a file cannot hold."""
        session: Plain = self._document["session"]
        run = session["run"]
        if run is None:
            return session
        kept = []
        for point in run["breakpoints"]:
            if "function" in (point["when"] or {}):
                warnings.warn(
                    f"the breakpoint at {point['site']!r} is not saved: its when= is a function of your own, which a "
                    "file cannot hold. Give it again: dj.restore(path, breakpoints=[...]).",
                    stacklevel=3,
                )
            else:
                kept.append(point)
        return {**session, "run": {**run, "breakpoints": kept}}

    def _weights(self) -> dict[str, str]:
        """The fingerprint of the weights it belongs to."""
        if self._identity is not None:
            return fingerprint(self._identity.weights)
        saved: dict[str, str] = self._document["weights"]
        return saved

    def _require_model(self, engine: Engine) -> None:
        found = model_differences(self._document["model"], describe_model(engine))
        if not found and self._identity is not engine.identity:
            found = weight_differences(self._weights(), fingerprint(engine.identity.weights))
        if found:
            raise CheckpointError(
                f"this checkpoint belongs to another model: {'; '.join(found)}. Restore it into the model it was taken "
                "from; exact=False does not help here."
            )

    def _require_environment(self, engine: Engine) -> None:
        found = environment_differences(self._document["environment"], describe_environment(engine))
        if found:
            raise CheckpointError(
                f"this checkpoint was taken in another environment: {'; '.join(found)}. The run would go on with other "
                "bits. Restore it in the same environment, or pass exact=False to accept other bits."
            )

    def __repr__(self) -> str:
        session = self._document["session"]
        run = session["run"]
        stop = run and run["flight"] and run["flight"]["stop"]
        at = f", stopped at {stop['site']!r}" if stop else ""
        return f"Checkpoint({len(session['tokens'])} tokens{at}, {self.nbytes} bytes)"


def take_checkpoint(session: Session) -> Checkpoint:
    """A checkpoint of a session as it stands; the caller holds the engine's lock.

    On CUDA the copies to pinned memory are only begun, in the order of the current stream.

    Raises:
        SessionBusy: the session's run is being driven just now.
    """
    engine = session.engine
    encoder = Encoder({site.order: site.name for site in engine.table.sites})
    encoded = encoder.session(snapshot(session))
    tensors = {name: _to_host(tensor) for name, tensor in encoder.tensors.items()} | _kv(session)
    arrived = None
    if engine.device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(engine.device))
    document = {"model": describe_model(engine), "environment": describe_environment(engine), "session": encoded}
    return Checkpoint(document, tensors, encoder.functions, engine.identity, arrived)


def _kv(session: Session) -> dict[str, torch.Tensor]:
    """Host copies of the committed KV by arena name, ``[heads, length, dim]``."""
    arena, length = session.engine.arena, session.length
    if session.host is not None:
        # Nothing writes into what was offloaded, so it is shared.
        found = [tensor[:, :length].contiguous() for tensor in session.host]
    else:
        rows = [tensor[session.row, :, :length] for pair in arena.layers for tensor in pair]
        found = [_to_host(row) if row.is_cuda else row.clone(memory_format=torch.contiguous_format) for row in rows]
    return dict(zip(arena.env, found, strict=True))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself on the CPU, else a copy of it, begun, in pinned memory."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _require_fit(engine: Engine, state: SessionState) -> None:
    """Raise unless the engine has the sites, the length and the ranks that a session needs."""
    sites = sorted((engine.table.get(name) for name in state.sites()), key=lambda site: site.order)
    for site in sites:
        require_compiled(site, engine.compiled_names)
    positions = len(state.tokens) - bool(state.sampled and state.sampled[-1])  # a last drawn token may wait outside
    if positions > engine.options.max_length:
        raise CapacityError(
            f"the checkpoint holds {positions} positions, but this model was compiled with "
            f"max_length={engine.options.max_length}. Compile with max_length={positions} or more."
        )
    ranks = [armed.rank.read.shape[0] for armed in state.edits() if armed.rank is not None]
    if max(ranks, default=0) > engine.options.edit_rank:
        raise CapacityError(
            f"the checkpoint holds an edit of {max(ranks)} directions, but this model was compiled with "
            f"edit_rank={engine.options.edit_rank}. Compile with edit_rank={max(ranks)} or more."
        )


def _fill(session: Session, state: SessionState, more: Sequence[ArmedBreakpoint], exact: bool) -> None:
    """Give a fresh session, whose KV is in place, everything else."""
    session.token_list, session.sampled = list(state.tokens), list(state.sampled)
    session.length, session.last_logits = state.length, state.last_logits
    session.steering, session.journal = state.steering, list(state.journal)
    saved = state.run
    if saved is None:
        return
    engine = session.engine
    capture = [engine.table.get(name) for name in saved.capture]
    run = Run(session, saved.options, saved.span, [*saved.breakpoints, *more], capture)
    run.first_step, run.records = saved.first_step, list(saved.records)
    run.finished, run.finish_reason = saved.finished, saved.finish_reason
    run.stopped_early = saved.stopped_early
    session.adopt(run)
    if saved.flight is None:
        return
    if saved.flight.stop is None:
        run.flight = Flight(saved.flight.step, saved.flight.passed)
    else:
        _stand(run, saved.flight.step, saved.flight.stop, exact)


def _stand(run: Run, step: Step, saved: StopState, exact: bool) -> None:
    """Run a step again up to the site where the run stood, and let it stand there."""
    engine = run.session.engine
    stop = moves.arrive(engine, run, step, engine.table.get(saved.site), saved.fired)
    if saved.changed:
        stop.value = saved.value
    elif exact and not same_bits(stop.value, saved.value):
        raise CheckpointError(
            f"the step in which this checkpoint was taken gives other bits here at {saved.site!r}, although model and "
            "environment are the same on paper. Were weights changed in place since? Pass exact=False to accept "
            "other bits."
        )
