"""What a pass may know beside its graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant

#: Turns a segment's graph into the callable that runs it.
Lower = Callable[[fx.GraphModule], Callable[..., tuple[torch.Tensor, ...]]]

#: Where a program is cut into segments.
Cuts = Literal["sites", "layers", "both", "none"]


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
