"""What a pass may know beside its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant

#: Turns a segment's graph into the callable that runs it.
Lower = Callable[[fx.GraphModule], Callable[..., tuple[torch.Tensor, ...]]]

#: Where a program is cut into segments.
Cuts = Literal["sites", "layers", "both", "none"]


@dataclass(frozen=True)
class Origin:
    """Where a program comes from.

    Attributes:
        model: name of the model's type or class.
        config: a language model's configuration; empty for plain modules.
        module: a plain module's clone; None for language models, whose configuration says enough.
        inputs: a plain module's arguments.
        arena: rows and positions of the KV arenas, each without the extra one.
    """

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    inputs: object = None
    arena: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class PassContext:
    """The options of one build.

    Attributes:
        kind: ``"lm"`` or ``"module"``.
        shape: shape of the program; zeros for plain modules.
        dtype: the model's dtype.
        sites: chosen sites in execution order.
        variant: which steering to compile in.
        rank: slots of the rank tables.
        lower: compiles one segment.
        cuts: ``"sites"``: a segment ends at each site; ``"layers"``: at a place per layer where nothing is lost, and
            nobody can stop (:mod:`djinn_fx.passes.joints`); ``"both"``: at each site, and so that no segment holds
            several layers; ``"none"``: one segment.
        grouped: linear layers of one input become one call of our own kernels, in steps of few tokens.
        origin: what a report of a failing pass needs beside these, to build the same program again.
    """

    kind: str
    shape: ProgramShape
    dtype: torch.dtype
    sites: tuple[Site, ...] = ()
    variant: Variant = "plain"
    rank: int = 0
    lower: Lower | None = None
    cuts: Cuts = "sites"
    grouped: bool = False
    origin: Origin | None = None


#: A pass: graph to graph.
Pass = Callable[[fx.GraphModule, PassContext], fx.GraphModule]


@dataclass(frozen=True)
class Stage:
    """A pass, its name and the stage whose invariants hold after it."""

    name: str
    stage: str
    run: Pass
