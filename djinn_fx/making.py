"""How the programs of one compiled language model are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from djinn_fx.kernels.backend import uses_triton
from djinn_fx.passes.context import Cuts, Lower
from djinn_fx.passes.exports import ExportCache
from djinn_fx.passes.pipeline import CaptureStore, build
from djinn_fx.passes.source import Source
from djinn_fx.program import Program
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.guard import WeightGuard
from djinn_fx.runtime.rehearsal import Rehearsal
from djinn_fx.runtime.streaming import Weights
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant


@dataclass(frozen=True, eq=False)
class Making:
    """What every program of a model is made of.

    Attributes:
        guard: watches the user's weights.
        source: the model, ready to be captured.
        store: keeps captures.
        exports: keeps them on disk, or None.
        rank: directions an edit may have.
        arena: the KV of all sessions.
        weights: copies that programs read in place of the user's; None: they read the user's.
        rehearsal: makes kernels ready meanwhile.
    """

    guard: WeightGuard
    source: Source
    store: CaptureStore
    exports: ExportCache | None
    rank: int
    arena: KVArena
    weights: Weights | None = None
    rehearsal: Rehearsal | None = None

    def build(
        self, lowering: Lower, shape: ProgramShape, variant: Variant, sites: Sequence[Site], *, pieces: bool = False
    ) -> Program:
        """Make a program; decode in ``pieces`` that are not cut at sites, or cut there."""
        self.guard.check()  # a program that is made in the middle of a run must read what the others read
        decode = pieces and shape.query == 1
        streams = self.weights is not None and bool(self.weights.placement.streamed)
        cuts: Cuts = "layers" if decode else "both" if streams else "sites"
        made = build(
            self.source,
            shape,
            sites=sites,
            variant=variant,
            rank=self.rank,
            arenas=self.arena.layers,
            lower=lowering,
            store=self.store,
            exports=self.exports,
            cuts=cuts,
            grouped=decode and _has_own_products(self.source),
        )
        if self.rehearsal is not None:
            self.rehearsal.over()  # what is made is run next
        return made if self.weights is None else replace(made, feed=self.weights.feed(made.segments, made.weights))


def build_choices(source: Source, backend: str) -> dict[str, str]:
    """What decides bits beside the model, the device and the versions."""
    kernels = "triton" if source.device.type == "cuda" and uses_triton() else "torch"
    return {"backend": backend, "kernels": kernels}


def weight_bytes(own: Mapping[str, torch.Tensor], weights: Weights | None) -> dict[str, int]:
    """Bytes of weights on the device, and of those on the host that stream there."""
    if weights is None:
        return {"weights": sum(tensor.nbytes for tensor in own.values()), "weights_streamed": 0}
    return {"weights": weights.device_bytes, "weights_streamed": weights.host_bytes}


def _has_own_products(source: Source) -> bool:
    """Whether our kernels serve the model's linear layers: 16-bit numbers on CUDA."""
    return source.device.type == "cuda" and source.dtype.itemsize == 2 and uses_triton()
