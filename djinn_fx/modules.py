"""Plain modules: ``djinn.compile(module, example_inputs=(x,))``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from djinn_fx.passes.pipeline import CaptureStore, build, discover
from djinn_fx.passes.source import flatten_inputs, normalise_inputs, prepare
from djinn_fx.program import PassRecord, Program
from djinn_fx.runtime.guard import WeightGuard
from djinn_fx.runtime.modules import ModuleRun
from djinn_fx.runtime.observe import Hook, HookPoint, placed
from djinn_fx.runtime.results import Cache
from djinn_fx.sites import SiteTable
from djinn_fx.specs import Breakpoint, ProgramShape

if TYPE_CHECKING:
    from djinn_fx.explain import Explanation


def compile_module(module: nn.Module, example_inputs: Any, sites: str | Iterable[str] | None) -> DjModule:
    """Compile any module with tensor inputs; see :func:`djinn_fx.compile`."""
    return DjModule(module, example_inputs, default_sites(module) if sites is None else sites)


def default_sites(module: nn.Module) -> list[str]:
    """Outputs of the children of each ModuleList or Sequential, else of the direct children."""
    listed = [
        f"{path}.{child}" if path else child
        for path, inner in module.named_modules()
        if isinstance(inner, (nn.ModuleList, nn.Sequential))
        for child, _ in inner.named_children()
    ]
    return listed or [name for name, _ in module.named_children()]


class DjModule:
    """A compiled plain module. Another input shape compiles another program."""

    def __init__(self, module: nn.Module, example_inputs: Any, sites: str | Iterable[str]) -> None:
        self._guard = WeightGuard(module)
        self._source = prepare(module, example_inputs)
        self._store = CaptureStore()
        self._table = discover(self._source, self._store)
        wanted = [sites] if isinstance(sites, str) else list(sites)
        known = {name for site in self._table.sites for name in (site.name, *site.aliases)}
        if not isinstance(sites, str):
            wanted = [name for name in wanted if name in known or "*" in name] or wanted
        self._sites = self._table.select(wanted)
        self._programs: dict[object, Program] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.run(*args, **kwargs).result()

    def run(self, *args: Any, breakpoints: Iterable[str | Breakpoint] = (), **kwargs: Any) -> ModuleRun:
        """A lazy run on these inputs: iterate it for its stops, ``result()`` is the module's return value.

        Raises:
            UnknownSite, SiteNotCompiled, CaptureError.
        """
        return self._run(args, kwargs, self._sites, breakpoints)

    def run_with_cache(self, *args: Any, sites: str | Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, Cache]:
        """The module's return value and the values of sites (default: the compiled ones), in their own shapes."""
        chosen = self._sites if sites is None else self._table.select(sites)
        run = self._run(args, kwargs, chosen, [site.name for site in chosen])
        values = {stop.site: stop.value for stop in run}
        return run.result(), Cache(self._table, values)

    def run_with_hooks(self, *args: Any, fwd_hooks: Sequence[tuple[str, Hook]] = (), **kwargs: Any) -> Any:
        """The module's return value with hooks ``fn(value, hook)`` at any of its sites."""
        named = placed(self._table, fwd_hooks)
        chosen = self._table.select([site.name for site, _ in named])
        run = self._run(args, kwargs, chosen, [site.name for site in chosen])
        for stop in run:
            for site, fn in named:
                if site.name == stop.site:
                    changed = fn(stop.value, hook=HookPoint(site.name, site.layer))
                    if changed is not None:
                        stop.value = changed
        return run.result()

    def first_nonfinite(self, *args: Any, sites: str | Iterable[str] = "*", **kwargs: Any) -> str | None:
        """The first site, in execution order, whose value holds a NaN or an infinity; None if all is finite."""
        chosen = self._table.select(sites)
        for stop in self._run(args, kwargs, chosen, [site.name for site in chosen]):
            if stop.value.is_floating_point() and not bool(torch.isfinite(stop.value).all()):
                return stop.site
        return None

    def add_sites(self, sites: str | Iterable[str]) -> None:
        """Compile more sites in."""
        more = self._table.select(sites)
        self._sites = self._table.select([site.name for site in (*self._sites, *more)])

    @property
    def sites(self) -> SiteTable:
        """Every site of the module."""
        return self._table

    @property
    def compiled_sites(self) -> tuple[str, ...]:
        """Names of the sites at which runs can stop."""
        return tuple(site.name for site in self._sites)

    @property
    def program(self) -> Program:
        """The program of the example inputs."""
        assert self._source.example_inputs is not None
        args, kwargs = self._source.example_inputs
        return self._program(args, kwargs, self._sites)[0]

    @property
    def passes(self) -> tuple[PassRecord, ...]:
        """What each compiler pass did to :attr:`program`."""
        return self.program.records

    def explain(self) -> Explanation:
        """A summary of the compiled program: a text for ``print``, a table in a terminal, HTML in a notebook."""
        from djinn_fx.explain import explain

        return explain(self.program, self._source.model_type)

    def _run(self, args: Any, kwargs: Any, sites: Any, breakpoints: Iterable[str | Breakpoint]) -> ModuleRun:
        self._guard.check()
        program, tensors = self._program(args, kwargs, sites)
        return ModuleRun(program, tensors, self._table, breakpoints)

    def _program(self, args: Any, kwargs: Any, sites: Any) -> tuple[Program, Mapping[str, torch.Tensor]]:
        inputs = normalise_inputs((args, kwargs)) if kwargs else normalise_inputs(tuple(args))
        tensors, shape_key = flatten_inputs(inputs)
        key = (shape_key, tuple(site.name for site in sites))
        if key not in self._programs:
            self._programs[key] = build(
                self._source,
                ProgramShape(0, 0, 0),
                sites=sites,
                variant="plain",
                rank=0,
                example_inputs=inputs,
                store=self._store,
            )
        return self._programs[key], tensors
