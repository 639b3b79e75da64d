"""Calls on whole prompts, without a session: forward, caches, hooks, the logit lens, the first NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from djinn_fx.errors import InvalidValue, SessionClosed
from djinn_fx.runtime.engine import Engine
from djinn_fx.runtime.inputs import PromptBatch, prompt_batch
from djinn_fx.runtime.kept import Kept, sending
from djinn_fx.runtime.observe import Hook, Observer, Sweep, placed
from djinn_fx.runtime.results import Cache, Output
from djinn_fx.runtime.retell import retold, retold_step
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from djinn_fx.select import select_positions
from djinn_fx.sites import Site
from djinn_fx.specs import Positions


class Looking:
    """What a compiled language model can be asked without changing anything.

    ``inputs`` are prompts, run by the unedited model; or one :class:`Session`, seen as it stands: its own steps run
    again on scratch memory, one row at a time, with every edit and all steering as they acted, with the value at its
    stop, and its last token forwarded. Or one :class:`Stop`: only the step in which the run stands, whole, whose tokens
    are then all there is. Nothing of the session changes.

    Attributes:
        engine: the machine behind the model.
        observer: runs whole prompts over scratch arenas.
    """

    engine: Engine
    observer: Observer

    def __call__(self, inputs: object) -> Output:
        """Plain forward of one or many prompts, or of a session or stop as it stands.

        Returns:
            ``.logits``, ``[B, T, vocab]`` in the layout given.

        Raises:
            InvalidValue, CapacityError: a prompt that is empty, malformed or too long.
        """
        batch = self._batch(inputs)
        logits = self.observer.sweep(batch, Sweep((), None, self.engine.options.prefill_chunk))
        return Output(batch.spread(logits))

    def run_with_cache(
        self,
        inputs: object,
        sites: str | Iterable[str] = "resid_post",
        *,
        positions: Positions | None = None,
        stop_after: str | None = None,
        logits: bool | int = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor | None, Cache]:
        """Forward one or many prompts and keep the values of sites, compiled in or not.

        Args:
            inputs: one prompt or many; or a session, or a stop.
            sites: which values to keep.
            positions: which positions to keep; negative ints count from each prompt's end; None keeps all, in the
                layout given.
            stop_after: end the pass after this site; no logits then.
            logits: False for none, True for all, an int for that many trailing positions.
            device: move kept values there. From a GPU to ``"cpu"``, values of 1 MiB and more lie in pinned memory that
                is used again once they are dropped, up to half of ``pinned_bytes`` in all.
            dtype: convert kept values to it.

        Returns:
            logits ``[B, T, vocab]`` or None, and the cache; values are ``[B, T, *feature_shape]``.

        Raises:
            UnknownSite, InvalidValue, CapacityError.
        """
        batch, table = self._batch(inputs), self.engine.table
        _require_trailing(batch, logits)
        chosen = table.select(sites)
        last = table.get(stop_after) if stop_after is not None else None
        if last is not None:
            chosen = tuple(site for site in chosen if site.order <= last.order)
        elif not logits and chosen:
            last = chosen[-1]
        cuts = {site.name: site for site in (*chosen, *((last,) if last else ()))}
        wanted = None if logits is True or any(s.axis == "kept" for s in chosen) else int(logits)
        plan = Sweep(
            tuple(sorted(cuts.values(), key=lambda site: site.order)),
            wanted,
            self.engine.options.prefill_chunk,
            last,
        )
        names = {site.name for site in chosen}
        taken = {tensor.untyped_storage().data_ptr() for tensor in self.engine.identity.weights.values()}

        def finish(site: Site, kept: Kept) -> Callable[[], torch.Tensor] | None:
            return send(select_positions(batch, kept, positions, taken)) if site.name in names else None

        with sending(device, dtype, self.engine.device, self.observer.values) as send:
            kept_logits, sent = self.observer.capture(batch, plan, finish)
            cache = Cache(table, {name: there() for name, there in sent.items() if there is not None})
        if not logits or not kept_logits:
            return None, cache
        if logits is True:
            return batch.spread(kept_logits), cache
        return torch.stack([row[-int(logits) :] for row in kept_logits]), cache

    def run_with_hooks(
        self,
        inputs: object,
        fwd_hooks: Sequence[tuple[str, Hook]] = (),
        *,
        logits: bool | int = True,
    ) -> torch.Tensor | None:
        """Forward with hooks, as TransformerLens has them, at any site, compiled in or not.

        Args:
            inputs: one prompt or many.
            fwd_hooks: pairs of a site (name or glob) and ``fn(value, hook)`` (or ``fn(value)``); ``value`` is
                ``[B, T, *feature_shape]`` in the layout given, zeros at pads; return a tensor of the same shape, or
                None to keep it (changes in place count).
            logits: False for none, True for all, an int for that many trailing positions.

        Returns:
            logits ``[B, T, vocab]`` or None.

        Raises:
            InvalidValue: hooks on a session or stop; or a hook that returned another shape or dtype.
        """
        if isinstance(inputs, (Session, Stop)):
            raise InvalidValue("run_with_hooks takes prompts; edit a session by session.steer or at its stops.")
        batch = self._batch(inputs)
        _require_trailing(batch, logits)
        hooks = placed(self.engine.table, fwd_hooks)
        rows = self.observer.with_hooks(batch, hooks, None if logits is True else int(logits) or 1)
        if logits is True:
            return batch.spread(rows)
        return torch.stack(rows) if logits else None

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """The tail segment on residuals ``[..., hidden]``: final norm, head, softcap, scale. The logit lens.

        Returns:
            logits ``[..., vocab]``.
        """
        self._alive()
        return self.observer.unembed(h)

    def first_nonfinite(self, inputs: object, sites: str | Iterable[str] = "*") -> tuple[str, tuple[Any, ...]] | None:
        """The first site, in execution order, with a NaN or an infinity; None if all is finite.

        Args:
            inputs: one prompt or many; or a session, or a stop.
            sites: where to look.

        Returns:
            the site's name and the positions, ints for one prompt, ``(row, position)`` pairs for many.
        """
        batch = self._batch(inputs)
        chosen = self.engine.table.select(sites)
        found = self.observer.first_nonfinite(batch, chosen)
        if found is None:
            return None
        site, places = found
        alone = len(batch.rows) == 1
        return site.name, tuple(position if alone else (row, position) for row, position in places)

    def _alive(self) -> None:
        if self.engine.closed:
            raise SessionClosed("this compiled model was closed; compile it again.")
        self.engine.guard()

    def _batch(self, inputs: object) -> PromptBatch:
        self._alive()
        if isinstance(inputs, Session):
            return retold(self.engine, inputs)
        if isinstance(inputs, Stop):
            return retold_step(self.engine, inputs)
        return prompt_batch(inputs, self.engine.tokenizer, self.engine.options.vocab_size)


def _require_trailing(batch: PromptBatch, logits: bool | int) -> None:
    """Raise where ``logits`` asks for more trailing positions than a prompt has."""
    shortest = min((len(row) for row in batch.rows), default=0)
    if logits < 0 or 0 < shortest < logits:
        raise InvalidValue(
            f"logits={logits}: give True, False, or a number of trailing positions, here at most {shortest}: so many "
            "tokens has the shortest prompt."
        )
