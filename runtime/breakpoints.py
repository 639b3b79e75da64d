"""Armed breakpoints of one run: which sites they watch and whether they fire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from djinn_fx.errors import InvalidPredicate, InvalidValue
from djinn_fx.runtime.launch import to_host
from djinn_fx.runtime.steps import Step
from djinn_fx.sites import Site, SiteTable, require_compiled
from djinn_fx.specs import Breakpoint
from djinn_fx.when import BuiltIn


@dataclass
class ArmedBreakpoint:
    """A breakpoint of one run: its sites resolved, and how many stops it may still deliver."""

    spec: Breakpoint
    sites: frozenset[str]
    left: int | None

    def watches(self, site: Site) -> bool:
        """Whether it may still fire at ``site``."""
        return site.name in self.sites and self.left != 0

    def delivered(self) -> None:
        """Count one delivered stop."""
        if self.left is not None:
            self.left -= 1

    def asks(self, step: Step) -> bool:
        """Whether its predicate has to look at the values of ``step``, a decode step."""
        return (
            self.spec.when is not None
            and not getattr(self.spec.when, "reads_token", False)
            and any(step.matching(self.spec.positions))
        )

    def fired(
        self, site: Site, step: Step, values: Callable[[list[int]], torch.Tensor], answer: Answer | None = None
    ) -> tuple[int, ...]:
        """Absolute positions of ``step`` at which it fires.

        Args:
            site: the site looked at.
            step: the step being run.
            values: gives a copy of the site's value at some of its tokens, ``[chosen, *feature_shape]``.
            answer: what the predicate said of a decode step's one position, where it was asked ahead.

        Raises:
            InvalidPredicate: the predicate failed or did not return one bool per position.
        """
        tokens = step.tokens_of(site)
        if self.spec.when is None and self.spec.positions == "all":  # almost always
            return tuple(range(step.start + tokens.start, step.start + tokens.stop))
        matched = step.matching(self.spec.positions)
        rows = [index for index, token in enumerate(tokens) if matched[token]]
        if rows and self.spec.when is not None:
            if answer is not None:
                answers = [answer.read()]
            elif getattr(self.spec.when, "reads_token", False):
                answers = evaluate(self.spec, torch.tensor([step.tokens[tokens[row]] for row in rows])).tolist()
            else:
                answers = evaluate(self.spec, values(rows)).tolist()
            rows = [row for row, answer in zip(rows, answers, strict=True) if answer]
        return tuple(step.start + tokens[row] for row in rows)


@dataclass
class Said:
    """What a predicate said at some places, on its way from the device.

    Attributes:
        host: bool ``[places]`` on the host, valid once it arrived.
        arrived: passes when they are there; None if they are.
    """

    host: torch.Tensor
    arrived: torch.cuda.Event | None
    _read: list[bool] | None = None

    def read(self) -> list[bool]:
        """All of it; the first time it waits for the device."""
        if self._read is None:
            if self.arrived is not None:
                self.arrived.synchronize()
            self._read = self.host.tolist()
        return self._read


@dataclass(frozen=True)
class Answer:
    """What a predicate said at one place: ``said`` at ``index``."""

    said: Said
    index: int

    def read(self) -> bool:
        """The answer; waits for the device."""
        return self.said.read()[self.index]


@dataclass(frozen=True)
class Question:
    """What a predicate is to be asked: one position at some sites whose values have one shape.

    Attributes:
        point: the breakpoint, which has a predicate.
        sites: the names of the sites.
        values: a copy of the value of each, ``[sites, *feature_shape]``.
    """

    point: ArmedBreakpoint
    sites: tuple[str, ...]
    values: torch.Tensor

    def ask(self) -> dict[tuple[int, str], Answer]:
        """Evaluate the predicate without waiting for the device; the answers by breakpoint (its identity) and site.

        Raises:
            InvalidPredicate: as :func:`evaluate`.
        """
        said = Said(*to_host(evaluate(self.point.spec, self.values)))
        return {(id(self.point), name): Answer(said, rank) for rank, name in enumerate(self.sites)}


def evaluate(spec: Breakpoint, values: torch.Tensor) -> torch.Tensor:
    """Evaluate a predicate on ``values`` ``[positions, ...]``, vectorised over positions: bool ``[positions]``.

    Raises:
        InvalidPredicate: it raised, or its result is not a 0-d bool tensor.
    """
    assert spec.when is not None
    try:
        with torch.no_grad():
            answers = spec.when.rows(values) if isinstance(spec.when, BuiltIn) else torch.func.vmap(spec.when)(values)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".rstrip(". ")
        own = " It is vectorised with torch.func.vmap: use tensor operations only, no `if` or .item() on data."
        raise InvalidPredicate(
            f"the predicate of break_at({spec.site!r}) failed on a value of shape {tuple(values.shape[1:])}: {said}."
            f"{'' if isinstance(spec.when, BuiltIn) else own}"
        ) from error
    if answers.dtype != torch.bool or answers.shape != values.shape[:1]:
        raise InvalidPredicate(
            f"the predicate of break_at({spec.site!r}) must return a 0-d bool tensor for each "
            f"position; it returned dtype {answers.dtype} and shape {tuple(answers.shape[1:])}."
        )
    return answers


def arm_breakpoints(
    specs: Iterable[str | Breakpoint],
    table: SiteTable,
    compiled: Sequence[Site],
    dtype: torch.dtype,
    device: torch.device,
) -> list[ArmedBreakpoint]:
    """Resolve the ``breakpoints=`` of a call; each predicate is tried once on zeros.

    Raises:
        UnknownSite, SiteNotCompiled, InvalidPredicate: as their names say.
    """
    names = [site.name for site in compiled]
    armed = []
    for given in (specs,) if isinstance(specs, (str, Breakpoint)) else specs:
        spec = Breakpoint(given) if isinstance(given, str) else given
        if not isinstance(spec, Breakpoint):
            raise InvalidValue(f"breakpoints: {given!r} is neither a site name nor a djinn.break_at(...).")
        sites = [require_compiled(site, names) for site in table.select(spec.site)]
        if spec.when is not None:
            for shape in {site.feature_shape for site in sites}:
                trial = torch.zeros((2, *shape), dtype=dtype, device=device)
                if getattr(spec.when, "reads_token", False):
                    trial = torch.zeros(2, dtype=torch.int64)
                evaluate(spec, trial)
        armed.append(ArmedBreakpoint(spec, frozenset(s.name for s in sites), spec.times))
    return armed
