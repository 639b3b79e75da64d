"""Runs of plain modules: no sessions, no KV; a run goes from segment to segment and stops between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from djinn_fx.errors import InvalidPredicate, InvalidValue, StaleStop
from djinn_fx.notebook import Shown
from djinn_fx.program import Program
from djinn_fx.runtime import showing
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.segments import Env, run_segments
from djinn_fx.sites import Site, SiteTable, require_compiled
from djinn_fx.specs import Breakpoint
from djinn_fx.views import View


class ModuleStop(Shown):
    """A plain module's run, stopped after one site; ``value`` has the module's own shape and may be changed."""

    def __init__(self, run: ModuleRun, site: Site, value: torch.Tensor) -> None:
        self._run, self._site, self._value = run, site, value
        self._like = (value.shape, value.dtype, value.device)

    @property
    def run(self) -> ModuleRun:
        """The run that stopped."""
        return self._run

    @property
    def site(self) -> str:
        """Canonical site name: a module's path."""
        return self._site.name

    @property
    def value(self) -> torch.Tensor:
        """The activation, in the module's own shape, on its device."""
        return self._value

    @value.setter
    def value(self, new: torch.Tensor) -> None:
        if self._run.stop is not self:
            raise StaleStop(f"cannot assign to stop.value: the run went on from {self.site!r}.")
        if not isinstance(new, torch.Tensor):
            raise InvalidValue(
                f"stop.value at {self.site!r} must be a tensor, got {type(new).__name__}. Assign "
                "torch.as_tensor(new).to(stop.value), or write a number in place: stop.value.fill_(number)."
            )
        self._require_like(new)
        self._value = new.detach().clone()

    def checked_value(self) -> torch.Tensor:
        """The value, still of the shape, dtype and device it was handed out with.

        Raises:
            InvalidValue: it was given another one through ``.data``, ``resize_`` or the like.
        """
        self._require_like(self._value)
        return self._value

    def _require_like(self, new: torch.Tensor) -> None:
        shape, dtype, device = self._like
        if (new.shape, new.dtype, new.device) != self._like:
            raise InvalidValue(
                f"stop.value at {self.site!r} is {tuple(shape)} {dtype} on {device}; cannot go on with "
                f"{tuple(new.shape)} {new.dtype} on {new.device}. Assign a tensor like it, or write in place."
            )

    def describe(self) -> View:
        """Where, and the value's numbers; notebooks show it."""
        return showing.module_stop_view(self)

    def __repr__(self) -> str:
        return f"ModuleStop({self.site!r}, value={tuple(self._value.shape)} {self._value.dtype})"


class ModuleRun:
    """One call of a plain module, an iterator of stops; :meth:`result` is what the module returns."""

    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, torch.Tensor],
        table: SiteTable,
        breakpoints: Iterable[str | Breakpoint],
    ) -> None:
        self._program = program
        self._env: Env = dict(inputs)
        self._done = 0
        self._reached: Site | None = None
        self._stop: ModuleStop | None = None
        self._watch = _resolve(breakpoints, table, program)
        self._quiet = False

    @property
    def stop(self) -> ModuleStop | None:
        """Where the run stands, or None."""
        return self._stop

    @property
    def finished(self) -> bool:
        """Whether every segment has run."""
        return self._done == len(self._program.segments)

    def __iter__(self) -> Iterator[ModuleStop]:
        return self

    def __next__(self) -> ModuleStop:
        stop = self._go()
        if stop is None:
            raise StopIteration
        return stop

    def result(self) -> Any:
        """Go on to the end without stopping and return the module's own return value."""
        self._quiet = True
        try:
            self._go()
        finally:
            self._quiet = False
        outputs = tuple(self._env[name] for name in self._program.outputs)
        assert self._program.rebuild is not None
        return self._program.rebuild(outputs)

    @torch.no_grad()
    def _go(self) -> ModuleStop | None:
        self._leave()
        while not self.finished:
            if self._reached is None:
                run_segments(self._program, self._env, self._done, self._done)
                self._reached = self._program.segments[self._done].site
            site = self._reached  # kept while predicates are asked: one that fails is asked again
            fires = site is not None and not self._quiet and self._fires(site)
            self._reached = None
            self._done += 1
            if site is not None and fires:
                self._stop = ModuleStop(self, site, self._env[site.name].clone())
                return self._stop
        return None

    def _leave(self) -> None:
        stop = self._stop
        if stop is not None and not same_bits(stop.checked_value(), self._env[stop.site]):
            self._env[stop.site] = stop.value.clone()
        self._stop = None

    def _fires(self, site: Site) -> bool:
        fired = False
        for index, (spec, sites, left) in enumerate(self._watch):
            if site.name in sites and left != 0 and _holds(spec, self._env[site.name]):
                fired = True
                self._watch[index] = (spec, sites, None if left is None else left - 1)
        return fired

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a run does not pickle.")


_Watch = tuple[Breakpoint, frozenset[str], int | None]


def _resolve(given: Iterable[str | Breakpoint], table: SiteTable, program: Program) -> list[_Watch]:
    names = [site.name for site in program.sites]
    watch: list[_Watch] = []
    for item in (given,) if isinstance(given, (str, Breakpoint)) else given:
        spec = Breakpoint(item) if isinstance(item, str) else item
        sites = [require_compiled(site, names) for site in table.select(spec.site)]
        if spec.positions != "all":
            raise InvalidValue(f"break_at({spec.site!r}): a plain module has no positions; leave positions= out.")
        watch.append((spec, frozenset(site.name for site in sites), spec.times))
    return watch


def _holds(spec: Breakpoint, value: torch.Tensor) -> bool:
    """A plain module's predicate sees the whole value."""
    if spec.when is None:
        return True
    try:
        answer = spec.when(value)
        if answer.dtype != torch.bool or answer.dim():
            raise TypeError(f"it returned {answer.dtype} of shape {tuple(answer.shape)}, not a 0-d bool tensor")
        return bool(answer)
    except Exception as error:
        raise InvalidPredicate(
            f"the predicate of break_at({spec.site!r}) failed: {type(error).__name__}: {error}."
        ) from error
