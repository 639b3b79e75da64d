"""The contract between the compiler (``passes``) and the machine (``runtime``): what a program is.

A program is a straight line of segments over a flat environment of named tensors. To run it, start with the weights
and the inputs, call each segment on the names it declares, and put what it returns under the names it declares. After
a segment that ends at a yield point the site's value lies under the site's own name, in the site's layout, and may be
read or replaced before the next segment runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, Variant

#: Names of the fixed inputs of a language model's program: ``tokens`` ``[rows, query]`` int64, ``positions``
#: ``[rows, query]`` int64 (absolute; 0 at pads), ``rows`` ``[rows]`` int64 (arena row of each batch row), ``lengths``
#: ``[rows]`` int64 (valid KV positions after this step; 0 for a dead row) and, where ``keep < query``, ``keep``
#: ``[rows, keep]`` int64 (indices along the query axis that reach the head). ``kv_name`` names the arenas.
TOKENS, POSITIONS, ROWS, LENGTHS, KEEP, LOGITS = "tokens", "positions", "rows", "lengths", "keep", "logits"


def kv_name(layer: int, part: str) -> str:
    """Environment name of a layer's arena; ``part`` is ``"k"`` or ``"v"``."""
    return f"kv.{layer}.{part}"


@dataclass(frozen=True)
class KVSpec:
    """What one layer keeps per position: arenas are ``[rows + 1, heads, positions + 1, dim]``."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class AttentionSpec:
    """What the attention of one layer is called with.

    Attributes:
        heads: query heads.
        layouts: strides of queries, keys and values along heads, positions and width.
        window: positions that a query sees, or None: all before it.
        softcap: bound of the logits, or None.
        scale: factor of the dot products.
        sinks: dtype of the sinks, or None where there are none.
    """

    heads: int
    layouts: tuple[tuple[int, ...], ...]
    window: int | None
    softcap: float | None
    scale: float
    sinks: torch.dtype | None = None


@dataclass(frozen=True)
class ValueSpec:
    """A tensor of a program's environment, described.

    Attributes:
        name: environment name.
        shape: tensor shape.
        dtype: tensor dtype.
        made_by: module path or input that makes it.
        alias_of: name of the value whose storage it shares, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str = ""
    alias_of: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = self.dtype.itemsize
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True)
class Segment:
    """A maximal run of the graph between two neighbouring cut points.

    Attributes:
        index: rank in the program.
        name: e.g. ``"segment_3"``.
        run: the lowered callable: takes the tensors named by ``inputs``, returns a tuple for ``outputs``.
        graph: the graph behind it.
        inputs: environment names it reads; it also writes those of the arenas and taps in place.
        outputs: environment names it makes; a site's value carries the site's name.
        site: the site at whose yield point it ends, or None at the program's end.
        live: everything that must survive this yield point beyond weights and inputs.
        layer: layer that its site belongs to, or None.
        weights: environment names of the weights it reads.
        compile_class: equal for segments that differ in their weights only.
    """

    index: int
    name: str
    run: Callable[..., tuple[torch.Tensor, ...]]
    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    site: Site | None
    live: tuple[ValueSpec, ...]
    layer: int | None
    weights: tuple[str, ...]
    compile_class: str


class Feed(Protocol):
    """Brings weights to where a program reads them, where they do not lie there all the time."""

    def running(self, segment: int) -> AbstractContextManager[None]:
        """What a segment runs in: its weights are there."""

    def capturing(self) -> AbstractContextManager[None]:
        """What a whole step is captured in, as a CUDA graph that brings its weights itself."""

    def join(self) -> None:
        """Asked at the end of the captured step: what it began belongs to it."""

    def replaying(self) -> AbstractContextManager[None]:
        """What the captured step is enqueued in."""


@dataclass(frozen=True)
class Program:
    """The compiled segments of one shape.

    Attributes:
        shape: batch rows, query length, kept positions (plain modules: zeros).
        variant: what steering it has compiled in.
        sites: the sites at which it can stop, in execution order.
        segments: in order; the last one ends the program.
        weights: parameters, buffers and constants by environment name; the model's own tensors, never copies, unless
            it runs on another device than the model lies on.
        inputs: every other input, in the graph's order.
        outputs: environment names of the results (a language model has one, ``"logits"``).
        records: one record per pass.
        rebuild: makes the module's own return value (a pytree) from the outputs; None for language models.
        feed: brings the weights; None: they are there.
    """

    shape: ProgramShape
    variant: Variant
    sites: tuple[Site, ...]
    segments: tuple[Segment, ...]
    weights: Mapping[str, torch.Tensor]
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[str, ...]
    records: tuple[PassRecord, ...]
    rebuild: Callable[[tuple[torch.Tensor, ...]], Any] | None = None
    feed: Feed | None = None

    def segment_of(self, site: str) -> int:
        """Index of the segment that ends at ``site``."""
        for segment in self.segments:
            if segment.site is not None and segment.site.name == site:
                return segment.index
        raise KeyError(site)


@dataclass(frozen=True)
class NodeInfo:
    """One graph node as a record keeps it: text only, so that records cost little and outlive graphs.

    Attributes:
        origin: stamped once when the node is made, the same in every later graph; 0: the output; negative: the call of
            a segment.
        name: the node's own name, which passes may renumber.
        op: ``"placeholder"``, ``"call_function"``, ``"call_module"`` (a segment) or ``"output"``.
        target: the op; for an input its environment name.
        args: the arguments as Python, another node written as ``%`` and its origin.
        module: path of the module that made it; ``""``: the model itself.
        site: the site whose value it is; before steering every name that it goes by, apart by spaces.
        shape: of its tensor, ``"[1, 1, 64]"``; ``""`` where it makes none.
        dtype: of its tensor, ``"float32"``.
    """

    origin: int
    name: str
    op: str
    target: str
    args: str
    module: str
    site: str
    shape: str
    dtype: str


@dataclass(frozen=True)
class LiveInfo:
    """One value that is alive at a yield point.

    Attributes:
        name: environment name.
        shape: ``"[1, 1, 64]"``.
        dtype: ``"float32"``.
        nbytes: its size.
        made_by: path of the module that makes it; ``""``: the model itself.
        origin: of the node that makes it.
        alias_of: environment name of the value whose storage it shares, or None.
    """

    name: str
    shape: str
    dtype: str
    nbytes: int
    made_by: str
    origin: int
    alias_of: str | None


@dataclass(frozen=True)
class SegmentInfo:
    """One segment as a record keeps it.

    Attributes:
        name: of its call, the target of a ``call_module`` node.
        site: at whose yield point it ends; ``""``: the program's end, or a cut where nobody stops.
        layer: the site's layer, or None.
        inputs: environment names it reads.
        outputs: environment names it makes.
        weights: number of weights among the inputs.
        weight_bytes: their size, each once.
        live: what must survive it; empty before the pass that finds it.
        compile_class: equal for segments that share a compilation; ``""`` before lowering.
    """

    name: str
    site: str
    layer: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: int
    weight_bytes: int
    live: tuple[LiveInfo, ...]
    compile_class: str

    @property
    def live_bytes(self) -> int:
        """Bytes of the live values, storage that two of them share counted once."""
        return sum(value.nbytes for value in self.live if value.alias_of is None)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        index: rank among the passes.
        name: of the pass.
        stage: whose invariants were checked after it.
        before: the graph that it was given.
        after: the graph that it made.
        seconds: what pass and checks took.
        verdict: what the checks said.
        segments: of the graph after it; empty before it is cut.
    """

    index: int
    name: str
    stage: str
    before: tuple[NodeInfo, ...]
    after: tuple[NodeInfo, ...]
    seconds: float
    verdict: str
    segments: tuple[SegmentInfo, ...] = ()
