"""Frozen descriptions that users and rooms hand to each other: edits, features, breakpoints, tables.

Nothing here runs a model. :class:`Edit` and :class:`Feature` are what users write; :func:`edit_tables` fixes the
tensors by which a compiled program receives them, so that the steer pass and the runtime cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from djinn_fx.errors import InvalidValue
from djinn_fx.sites import Site

#: Which positions an edit or a breakpoint speaks of: a word, a tuple of words, an int, a slice or a sequence of ints.
Positions = str | int | slice | Sequence[int] | tuple[str, ...]
POSITION_WORDS = ("all", "prompt", "generated", "last_prompt")

Variant = Literal["plain", "armed", "rank"]

#: Codes of :attr:`Feature.act` in the ``kind`` table.
ACTIVATIONS: dict[str, int] = {"linear": 0, "relu": 1, "jumprelu": 2}


@dataclass(frozen=True, eq=False)
class Feature:
    """A readable and writable direction, such as an SAE feature.

    With ``p = act(h . read + bias)`` and ``target`` given by ``set``, ``min`` and ``max``, the activation becomes
    ``h + (target(p) - p) * write``: only the feature's own contribution changes.

    Attributes:
        read: ``[width]`` or ``[k, width]`` encoder direction(s).
        write: decoder direction(s), the shape of ``read``.
        bias: added to the read-out before the activation.
        act: ``"linear"``, ``"relu"`` or ``"jumprelu"`` (Rajamanoharan et al. 2024, arXiv:2407.14435).
        threshold: JumpReLU's threshold; smaller pre-activations count as 0.
        set: the value the feature shall have; or None.
        min: lower bound for the feature; or None.
        max: upper bound for the feature; or None.
    """

    read: torch.Tensor
    write: torch.Tensor
    bias: float = 0.0
    act: Literal["linear", "relu", "jumprelu"] = "linear"
    threshold: float = 0.0
    set: float | None = None
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.act not in ACTIVATIONS:
            raise InvalidValue(f"Feature(act={self.act!r}): choose one of {', '.join(ACTIVATIONS)}.")
        if self.read.shape != self.write.shape or self.read.dim() not in (1, 2):
            raise InvalidValue(
                f"Feature: read is {tuple(self.read.shape)} and write {tuple(self.write.shape)}; "
                "both must be [width] or [k, width]."
            )
        if self.set is None and self.min is None and self.max is None:
            raise InvalidValue("Feature: nothing to do; give set=, min= or max=.")
        if self.set is not None and (self.min is not None or self.max is not None):
            raise InvalidValue("Feature: set= fixes the value, so min= and max= have no meaning beside it.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise InvalidValue(f"Feature: min={self.min} is above max={self.max}.")


@dataclass(frozen=True, eq=False)
class Edit:
    """A standing change of one site's value, applied in the order scale, add, ablate and feature.

    Attributes:
        site: site name.
        scale: factor, a float or a tensor of the site's width.
        add: vector of the site's width to add; or None.
        ablate: direction ``[width]`` or directions ``[k, width]`` whose span is projected out; or None.
        strength: scales the whole change; 0 is no change at all.
        feature: a :class:`Feature` to set or clamp; or None.
        positions: which positions it acts on (absolute, 0-based).
    """

    site: str
    scale: float | torch.Tensor = 1.0
    add: torch.Tensor | None = None
    ablate: torch.Tensor | None = None
    strength: float = 1.0
    feature: Feature | None = None
    positions: Positions = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", normal_positions(self.positions))
        for name in ("scale", "add", "ablate"):
            object.__setattr__(self, name, _number_or_tensor(self.site, name, getattr(self, name)))
        self._check_numbers()
        tensors = [self.scale, self.add, self.ablate]
        if self.feature is not None:
            tensors += [self.feature.read, self.feature.write]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                raise InvalidValue(
                    f"Edit({self.site!r}): a tensor requires grad, but compiled programs do not run autograd. "
                    "Pass tensor.detach()."
                )

    def _check_numbers(self) -> None:
        """Raise where a field is not what it should be."""
        where = f"Edit({self.site!r})"
        strength: object = self.strength
        scale: object = self.scale
        vectors: tuple[tuple[str, object], ...] = (("add", self.add), ("ablate", self.ablate))
        feature: object = self.feature
        if feature is not None and not isinstance(feature, Feature):
            raise InvalidValue(f"{where}: feature={feature!r} is not a djinn.Feature.")
        if not isinstance(strength, (int, float)):
            raise InvalidValue(f"{where}: strength={strength!r} is not a number.")
        if scale is None:
            raise InvalidValue(f"{where}: scale=None is neither a number nor a vector.")
        for name, vector in vectors:
            if vector is not None and not (isinstance(vector, torch.Tensor) and vector.dim() and vector.numel()):
                raise InvalidValue(f"{where}: {name}={vector!r} is not a vector of the site's width.")


def _number_or_tensor(site: str, name: str, value: object) -> object:
    """Lists and NumPy arrays as tensors; numbers, None and tensors as they are."""
    if value is None or isinstance(value, (int, float, torch.Tensor)):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidValue(f"Edit({site!r}): {name}={value!r} is neither a number nor a vector.") from error


def normal_positions(positions: object) -> Positions:
    """A ``positions=`` argument in a form that nobody else can change: sequences become tuples.

    Raises:
        InvalidValue: naming the accepted forms.
    """
    if isinstance(positions, Iterable) and not isinstance(positions, str):
        positions = tuple(positions)
        words = all(isinstance(item, str) and item in POSITION_WORDS for item in positions)
        valid = words or all(_is_position(item) for item in positions)
    elif isinstance(positions, slice):
        bounds = (positions.start, positions.stop)
        valid = positions.step is None and all(bound is None or _is_position(bound) for bound in bounds)
    else:
        valid = positions in POSITION_WORDS if isinstance(positions, str) else _is_position(positions)
    if not valid:
        forms = (
            f"one of {', '.join(map(repr, POSITION_WORDS))}, a tuple of these, an int, a slice or a sequence of ints"
        )
        raise InvalidValue(f"positions={positions!r}: expected {forms}; positions are absolute and 0-based.")
    normal: Any = positions
    return normal  # type: ignore[no-any-return]


def _is_position(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Support:
    """What ``djinn.check`` says of a model.

    Attributes:
        ok: whether ``djinn.compile`` would try it.
        reasons: why not, or, where ``ok``, what to know beforehand.
    """

    ok: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProgramShape:
    """The shape of one program.

    Attributes:
        rows: batch rows.
        query: query tokens per row.
        keep: positions per row that reach the head (``query`` means all of them).
    """

    rows: int
    query: int
    keep: int


@dataclass(frozen=True)
class TableSpec:
    """One input tensor of the steering of a site: its name, shape, dtype and neutral value."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    neutral: float


def edit_tables(
    site: Site, shape: ProgramShape, variant: Variant, dtype: torch.dtype, rank: int
) -> tuple[TableSpec, ...]:
    """The steering inputs of ``site`` in a program, in the order in which the program takes them.

    ``dtype`` is the model's; where the site's value has another one, that counts. Tables are fp32 (fp64 for an fp64
    value). With ``F = prod(feature_shape)`` and ``T`` the site's token axis:

    - ``act`` bool ``[rows, T, 1...]`` gates scale and add; ``scale``, ``add`` ``[rows, 1, *feature_shape]`` (neutral 1
      and -0.0: adding -0.0 changes no bit, adding 0.0 would turn -0.0 into 0.0);
    - ``inject`` bool ``[rows, 1, 1...]`` and ``tap`` ``[rows, T, *feature_shape]`` in the value's dtype;
    - variant ``"rank"`` adds ``rank_act`` bool ``[rows, T, 1...]``, ``slot`` bool ``[rows, rank]``, ``read`` and
      ``write`` ``[rows, rank, F]``, ``kind`` int64, ``bias``, ``threshold``, ``low``, ``high``, ``strength``
      ``[rows, rank]``.
    """
    if variant == "plain":
        return ()
    tokens = shape.keep if site.axis == "kept" else shape.query
    ones = (1,) * len(site.feature_shape)
    dtype = site.dtype or dtype
    wide = torch.promote_types(dtype, torch.float32)
    gate, row = (shape.rows, tokens, *ones), (shape.rows, 1, *site.feature_shape)
    slots, vectors = (shape.rows, rank), (shape.rows, rank, site.width)
    parts: list[tuple[str, tuple[int, ...], torch.dtype, float]] = [
        ("act", gate, torch.bool, 0.0),
        ("scale", row, wide, 1.0),
        ("add", row, wide, -0.0),
    ]
    if variant == "rank":
        parts += [
            ("rank_act", gate, torch.bool, 0.0),
            ("slot", slots, torch.bool, 0.0),
            ("read", vectors, wide, 0.0),
            ("write", vectors, wide, 0.0),
            ("kind", slots, torch.int64, 0.0),
            ("bias", slots, wide, 0.0),
            ("threshold", slots, wide, 0.0),
            ("low", slots, wide, float("-inf")),
            ("high", slots, wide, float("inf")),
            ("strength", slots, wide, 1.0),
        ]
    parts += [
        ("inject", (shape.rows, 1, *ones), torch.bool, 0.0),
        ("tap", (shape.rows, tokens, *site.feature_shape), dtype, 0.0),
    ]
    return tuple(TableSpec(f"{site.name}:{part}", dims, kind, neutral) for part, dims, kind, neutral in parts)


@dataclass(frozen=True, eq=False)
class Breakpoint:
    """Where and when a run stops; :func:`break_at` makes one.

    Attributes:
        site: site name, alias or glob.
        when: predicate on one position's activation, returning a 0-d bool tensor; None: always.
        positions: which positions count (absolute, 0-based).
        times: how many stops it delivers before it falls silent; None: no limit.
    """

    site: str
    when: Callable[[torch.Tensor], torch.Tensor] | None = None
    positions: Positions = "all"
    times: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", normal_positions(self.positions))
        if self.times is not None and self.times < 1:
            raise InvalidValue(f"break_at({self.site!r}, times={self.times}): times must be 1 or more.")
        if self.when is not None and not callable(self.when):
            raise InvalidValue(f"break_at({self.site!r}): when= must be callable, got {self.when!r}.")


def break_at(
    site: str,
    when: Callable[[torch.Tensor], torch.Tensor] | None = None,
    *,
    positions: Positions = "all",
    times: int | None = None,
) -> Breakpoint:
    """A breakpoint at ``site``, for the ``breakpoints=`` of a run.

    Args:
        site: site name, alias or glob (``"resid_post.*"``).
        when: predicate: gets one position's activation ``[hidden]``, returns a 0-d bool tensor; it is vectorised with
            ``torch.func.vmap``. :mod:`djinn_fx.when` has ready ones.
        positions: which positions count.
        times: stop at most so often.

    Raises:
        InvalidValue: positions, times or when of the wrong form.
    """
    return Breakpoint(site, when, positions, times)
