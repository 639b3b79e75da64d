"""What runs return: results, and caches of captured activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from djinn_fx.errors import InvalidValue, UnknownSite
from djinn_fx.notebook import Shown
from djinn_fx.runtime import showing
from djinn_fx.sites import SiteTable, from_transformer_lens
from djinn_fx.views import View


class Cache(Shown, Mapping[str, torch.Tensor]):
    """Captured activations by site; every name of a site works, TransformerLens names and pairs too.

    Values are ``[B, T, *feature_shape]`` from batched calls and ``[T, *feature_shape]`` from one session's run.
    """

    def __init__(self, table: SiteTable, values: Mapping[str, torch.Tensor], *, batched: bool = True) -> None:
        self._table, self._values, self._batched = table, dict(values), batched

    def __getitem__(self, name: str | tuple[str, int]) -> torch.Tensor:
        """The captured value of a site.

        Args:
            name: its name; or its role and its layer, from the end where that is negative, as in TransformerLens:
                ``cache["resid_post", -1]``, ``cache["q", 0]``.

        Raises:
            UnknownSite: no such site, several, or one that was not captured in this call.
            InvalidValue: something else than a name.
        """
        site = self._table.single(self._named(name))
        if site.name not in self._values:
            raise UnknownSite(
                f"site {site.name!r} was not captured in this call; it captured {', '.join(self._values) or 'nothing'}."
            )
        return self._values[site.name]

    def _named(self, name: Any) -> Any:
        if not isinstance(name, tuple) or list(map(type, name)) != [str, int]:
            return name  # the table says what is wrong with it
        role, layer = name
        if layer < 0:
            layer += 1 + max((site.layer for site in self._table.sites if site.layer is not None), default=-1)
        for place in ("", "attn.", "mlp."):
            hook = f"blocks.{layer}.{place}hook_{role}"
            if (found := from_transformer_lens(hook)) != hook:
                return found
        return f"{role}.{layer}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self._table.single(name).name in self._values
        except UnknownSite:
            return False

    def stack(self, role: str, position: int | None = None) -> torch.Tensor:
        """All captured layers of one role.

        Args:
            role: e.g. ``"resid_post"``.
            position: index on the token axis, e.g. -1; None keeps all.

        Returns:
            ``[layers, B, *feature_shape]`` (``[layers, B, T, *feature_shape]`` without ``position``); no ``B`` for one
            session's run.

        Raises:
            UnknownSite: nothing of this role was captured.
            InvalidValue: the layers' values differ in shape.
        """
        values = [self._values[s.name] for s in self._table.select(role) if s.name in self._values]
        if not values:
            raise UnknownSite(f"no site of {role!r} was captured in this call.")
        if len({value.shape for value in values}) > 1:
            raise InvalidValue(f"the captured values of {role!r} differ in shape and cannot be stacked.")
        stacked = torch.stack(values)
        if position is None:
            return stacked
        return stacked.select(2 if self._batched else 1, position)

    @property
    def axes(self) -> int:
        """Axes before the feature axes: 2 (``[B, T]``), 1 (``[T]``), or 0 for a plain module's values."""
        whole = any(self._table.get(name).axis == "whole" for name in self._values)
        return 0 if whole else 2 if self._batched else 1

    def describe(self) -> View:
        """Sites, shapes, bytes and norms; notebooks show it."""
        return showing.cache_view(self, self.axes)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self._values.items())
        return f"Cache({inside or 'empty'})"


@dataclass(frozen=True, eq=False)
class Result(Shown):
    """The outcome of a finished run.

    Attributes:
        tokens: the call's prompt and what was generated, int64 ``[T]`` on the CPU.
        logits: ``forward``: ``[T, vocab]``; ``generate`` with ``output_logits=True``: ``[new, vocab]``; else None.
        cache: values of the sites in ``capture=``.
        finish_reason: ``"eos"``, ``"length"``, ``"stop_token"``, or ``"breakpoint"`` (batched generation); None for
            ``forward``.
        text: the generated text where the model was compiled with a tokenizer, else None.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None
    cache: Cache
    finish_reason: str | None
    text: str | None = None

    def describe(self) -> View:
        """Tokens, text and what was captured; notebooks show it."""
        return showing.result_view(self)


@dataclass(frozen=True)
class Output:
    """The outcome of a plain forward call: ``logits`` ``[B, T, vocab]``, zeros at pads."""

    logits: torch.Tensor


@dataclass
class StepRecord:
    """What one committed step gave its run: captured values and logits, for the result.

    ``stepped`` is False for a token drawn from what an earlier call left: no step of this run.
    """

    start: int
    captured: Mapping[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    stepped: bool = True
