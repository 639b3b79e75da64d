"""Steering: edits resolved to tensors, and the handle a user holds on one.

Arithmetic is that of ``edit_tables``: tables are fp32 (fp64 for fp64 models), so that a scale of 0.9 means 0.9 and not
the nearest bf16 number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from djinn_fx.errors import InvalidValue
from djinn_fx.sites import Site
from djinn_fx.specs import ACTIVATIONS, Edit, Feature

if TYPE_CHECKING:
    from djinn_fx.runtime.session import Session


@dataclass(frozen=True, eq=False)
class RankPart:
    """The directions of an edit, one slot each: tensors of :func:`djinn_fx.specs.edit_tables` for one row."""

    read: torch.Tensor
    write: torch.Tensor
    kind: torch.Tensor
    bias: torch.Tensor
    threshold: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    strength: torch.Tensor


@dataclass(frozen=True, eq=False)
class Armed:
    """An edit in force: its identity, the user's words and the tensors that stand for them.

    Attributes:
        key: identity of the handle that made it.
        edit: the edit, its site name canonical.
        scale: ``[*feature_shape]`` in the table dtype, or None for no change.
        add: ``[*feature_shape]``, or None.
        rank: the directions to read and write, or None.
    """

    key: int
    edit: Edit
    scale: torch.Tensor | None
    add: torch.Tensor | None
    rank: RankPart | None

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing."""
        return self.scale is None and self.add is None and self.rank is None


def arm(key: int, edit: Edit, site: Site, dtype: torch.dtype, device: torch.device, rank: int) -> Armed:
    """Resolve ``edit`` for ``site``: check shapes, fold the strength in, orthonormalise directions.

    Raises:
        InvalidValue: a tensor of the wrong width, a number that is NaN or infinite, a direction of length zero, or more
            directions than ``rank``.
    """
    edit = _owned(edit)
    wide = torch.promote_types(dtype, torch.float32)
    _require_numbers(edit, site, wide)
    resolver = _Resolver(site, wide, device)
    strength = float(edit.strength)
    scale = add = None
    if strength != 0.0:
        scale = resolver.scale(edit.scale, strength)
        add = None if edit.add is None else resolver.vector("add", edit.add) * strength
        if add is not None and not bool((add != 0).any()):
            add = None
    parts = []
    if edit.ablate is not None and strength != 0.0:
        basis = resolver.basis(edit.ablate)
        parts.append(resolver.slots(basis, basis, Feature(basis, basis, set=0.0), strength))
    if edit.feature is not None and strength != 0.0:
        read = resolver.directions("feature.read", edit.feature.read)
        write = resolver.directions("feature.write", edit.feature.write)
        parts.append(resolver.slots(read, write, edit.feature, strength))
    joined = _join(parts)
    if joined is not None and joined.read.shape[0] > rank:
        raise InvalidValue(
            f"edit of {site.name!r} uses {joined.read.shape[0]} directions, but the model was compiled with "
            f"edit_rank={rank}. Compile with edit_rank={joined.read.shape[0]} or use fewer."
        )
    return Armed(key, replace(edit, site=site.name), scale, add, joined)


def _require_numbers(edit: Edit, site: Site, wide: torch.dtype) -> None:
    """Raise where a number of an edit is not finite in the tables' dtype; a bound may be infinite."""
    found: dict[str, object] = {"strength": edit.strength, "scale": edit.scale}
    if edit.feature is not None:
        found |= {f"feature.{name}": getattr(edit.feature, name) for name in ("bias", "threshold", "set")}
        bounds = {f"feature.{name}": getattr(edit.feature, name) for name in ("min", "max")}
        found |= {name: bound for name, bound in bounds.items() if bound is not None and not math.isinf(bound)}
    for name, value in found.items():
        if isinstance(value, (int, float)) and not abs(value) <= torch.finfo(wide).max:
            raise _not_finite(site, f"{name}={value}")


def _not_finite(site: Site, what: str) -> InvalidValue:
    return InvalidValue(
        f"edit of {site.name!r}: {what} is NaN, infinite or too large, and would make every later layer NaN or Inf. If "
        "that is what you want, write it into stop.value at a stop, which takes any value."
    )


def _owned(edit: Edit) -> Edit:
    """The edit with tensors of its own: history must not change when the user changes theirs."""
    scale = edit.scale.clone() if isinstance(edit.scale, torch.Tensor) else edit.scale
    add = None if edit.add is None else edit.add.clone()
    ablate = None if edit.ablate is None else edit.ablate.clone()
    feature = edit.feature
    if feature is not None:
        feature = replace(feature, read=feature.read.clone(), write=feature.write.clone())
    positions = tuple(edit.positions) if isinstance(edit.positions, list) else edit.positions
    return replace(edit, scale=scale, add=add, ablate=ablate, feature=feature, positions=positions)


@dataclass(frozen=True)
class _Resolver:
    site: Site
    wide: torch.dtype
    device: torch.device

    def scale(self, scale: float | torch.Tensor, strength: float) -> torch.Tensor | None:
        if isinstance(scale, torch.Tensor) and scale.dim() > 0:
            factor = self.vector("scale", scale).clone()  # steps keep it, and the user may change his
        else:
            given = torch.full(self.site.feature_shape, float(scale), dtype=torch.float64, device=self.device)
            factor = self._finite("scale", given.to(self.wide))
        if strength != 1.0:
            factor = 1.0 + strength * (factor - 1.0)
        return factor if bool((factor != 1.0).any()) else None

    def vector(self, what: str, value: torch.Tensor) -> torch.Tensor:
        """``value`` as ``[*feature_shape]``; a ``[d_head]`` vector serves every head."""
        shape = self.site.feature_shape
        value = self._finite(what, value.detach().to(self.device, self.wide))
        if tuple(value.shape) == shape or (len(shape) > 1 and tuple(value.shape) == shape[-1:]):
            return value.expand(shape).contiguous()
        if value.dim() == 1 and value.numel() == self.site.width:
            return value.reshape(shape).contiguous()
        raise InvalidValue(
            f"edit of {self.site.name!r}: {what} has shape {tuple(value.shape)}, "
            f"but one position of this site is {shape}."
        )

    def directions(self, what: str, value: torch.Tensor) -> torch.Tensor:
        """``value`` as ``[k, width]``."""
        rows = value.detach().to(self.device, self.wide)
        rows = rows.reshape(1, -1) if rows.dim() == 1 else rows.flatten(1)
        if rows.shape[-1] != self.site.width:
            raise InvalidValue(
                f"edit of {self.site.name!r}: {what} has shape {tuple(value.shape)}, "
                f"but directions of this site are [{self.site.width}] or [k, {self.site.width}]."
            )
        return (rows if what == "ablate" else self._finite(what, rows)).contiguous()

    def _finite(self, what: str, value: torch.Tensor) -> torch.Tensor:
        """The value; raises where an element is not finite in the tables' dtype."""
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise _not_finite(self.site, f"{what} (in {bad} of {value.numel()} numbers)")
        return value

    def basis(self, value: torch.Tensor) -> torch.Tensor:
        """Orthonormal basis ``[k, width]`` of the span of the directions, in fp64, rounded once."""
        rows = self.directions("ablate", value).double()
        lengths = rows.norm(dim=-1)
        if not bool(torch.isfinite(lengths).all()) or bool((lengths == 0).any()):
            raise InvalidValue(
                f"edit of {self.site.name!r}: ablate holds a direction of length 0 or with NaN or Inf in it."
            )
        found: list[torch.Tensor] = []
        for row in rows / lengths[:, None]:
            for _ in range(2):  # the second time takes out what rounding left of the first
                for unit in found:
                    row = row - (row @ unit) * unit
            # A shorter rest is rounding of the directions as given: they depend on each other.
            if float(row.norm()) > 64 * torch.finfo(self.wide).eps:
                found.append(row / row.norm())
        return torch.stack(found).to(self.wide)

    def slots(self, read: torch.Tensor, write: torch.Tensor, feature: Feature, strength: float) -> RankPart:
        count = read.shape[0]
        low = feature.set if feature.set is not None else feature.min
        high = feature.set if feature.set is not None else feature.max

        def full(value: float) -> torch.Tensor:
            return torch.full((count,), value, dtype=self.wide, device=self.device)

        return RankPart(
            read=read,
            write=write,
            kind=torch.full((count,), ACTIVATIONS[feature.act], dtype=torch.int64, device=self.device),
            bias=full(feature.bias),
            threshold=full(feature.threshold),
            low=full(float("-inf") if low is None else low),
            high=full(float("inf") if high is None else high),
            strength=full(strength),
        )


def _join(parts: Iterable[RankPart]) -> RankPart | None:
    parts = list(parts)
    if not parts:
        return None
    names = RankPart.__dataclass_fields__
    return RankPart(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


class SteerHandle:
    """A standing edit of one session, as :meth:`Session.steer` returns it.

    ``strength`` may be changed and ``remove()`` called at any time; both act from here on.
    """

    def __init__(self, session: Session, site: str, key: int) -> None:
        self._session, self._site, self._key = session, site, key

    @property
    def site(self) -> str:
        """Canonical site name."""
        return self._site

    @property
    def active(self) -> bool:
        """Whether the edit is in force: not removed, replaced or rewound away."""
        armed = self._session.steering.get(self._site)
        return armed is not None and armed.key == self._key

    @property
    def edit(self) -> Edit:
        """The edit in force; its tensors are copies.

        Raises:
            InvalidValue: it is no longer in force.
        """
        self._require("read")
        return _owned(self._session.steering[self._site].edit)

    @property
    def strength(self) -> float:
        """Factor on the whole change; assigning acts from here on."""
        self._require("read")
        return self._session.steering[self._site].edit.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._require("change")
        self._session.set_steering(self._key, replace(self.edit, strength=float(value)))

    def remove(self) -> None:
        """End the edit from here on; removing twice does nothing."""
        if self.active:
            self._session.drop_steering(self._site)

    def _require(self, verb: str) -> None:
        if not self.active:
            raise InvalidValue(
                f"cannot {verb} this steering of {self._site!r}: it was removed, replaced by a later steer() on the "
                "same site, or rewound away. Call session.steer() again."
            )

    def __repr__(self) -> str:
        state = f"strength={self.strength}" if self.active else "not in force"
        return f"SteerHandle({self._site!r}, {state})"
