"""The compiler's table of contents: a model becomes a table of sites, and a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import fx, nn

from djinn_fx.errors import InvalidValue
from djinn_fx.passes.annotate import annotate
from djinn_fx.passes.capture import capture_module, capture_step
from djinn_fx.passes.codec import Captured
from djinn_fx.passes.context import Cuts, Lower, Origin, PassContext, Stage
from djinn_fx.passes.exports import ExportCache
from djinn_fx.passes.graph import (
    CUT,
    ENV,
    REBUILD,
    WEIGHT,
    copy_graph,
    placeholders,
    results,
)
from djinn_fx.passes.head import head
from djinn_fx.passes.identity import export_key
from djinn_fx.passes.lower import CLASS, RUN, lower, lower_eager
from djinn_fx.passes.projections import projections
from djinn_fx.passes.residuals import residuals
from djinn_fx.passes.roles import assign_roles
from djinn_fx.passes.runner import run_passes
from djinn_fx.passes.source import Inputs, Source, flatten_inputs, normalise_inputs
from djinn_fx.passes.split import INPUTS, OUTPUTS, split
from djinn_fx.passes.steer import steer
from djinn_fx.passes.tables import at_this_shape, site_table
from djinn_fx.passes.trace import Trace, record_build, versions
from djinn_fx.passes.yields import LIVE, describe, segment_calls, yields
from djinn_fx.program import PassRecord, Program, Segment
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import ProgramShape, Variant

Arenas = Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class CaptureStore:
    """Keeps captured graphs, so that another variant of a shape does not export again."""

    captured: dict[object, Captured] = field(default_factory=dict)


def discover(source: Source, store: CaptureStore | None = None, exports: ExportCache | None = None) -> SiteTable:
    """Every site of the model, from one capture of a small shape.

    Args:
        source: what :func:`djinn_fx.passes.source.prepare` made.
        store: keeps the capture.
        exports: keeps it on disk.

    Raises:
        CaptureError: the model cannot be captured.
    """
    shape = _telling_shape(source)
    inputs = source.example_inputs
    captured = _captured(source, shape, _small_arenas(source), inputs, store, exports)
    return site_table(captured.graph, PassContext(source.kind, shape, source.dtype))


def build(
    source: Source,
    shape: ProgramShape,
    *,
    sites: Sequence[Site],
    variant: Variant,
    rank: int,
    arenas: Arenas = (),
    lower: Lower = lower_eager,
    example_inputs: object = None,
    store: CaptureStore | None = None,
    exports: ExportCache | None = None,
    cuts: Cuts = "sites",
    grouped: bool = False,
) -> Program:
    """Make the program of one shape.

    Args:
        source: what :func:`djinn_fx.passes.source.prepare` made.
        shape: batch rows, query length and kept positions; zeros for a plain module.
        sites: where the program can stop and be steered, from :func:`discover`.
        variant: the steering to compile in.
        rank: slots of the rank tables.
        arenas: keys and values of each layer.
        lower: makes a segment's callable from its graph.
        example_inputs: for a plain module, other inputs than the source's.
        store: keeps the capture for the next build of this shape.
        exports: keeps captures of language models on disk.
        cuts: ``"sites"`` or ``"both"``; or elsewhere: the sites are then steered and tapped, but nobody can stop there.
        grouped: give linear layers to our own kernels: the passes ``projections`` and ``residuals``.

    Raises:
        CaptureError: the model cannot be captured at this shape.
        InvalidValue: a shape or variant that does not exist for this model.
    """
    run = _Build(source, shape, sites, variant, rank, arenas, example_inputs, store, exports, cuts, grouped, lower)
    gm, ctx, records = run.passes()
    return _program(gm, ctx, records)


def passes_of(
    source: Source,
    shape: ProgramShape,
    *,
    sites: Sequence[Site],
    variant: Variant,
    rank: int,
    arenas: Arenas = (),
    store: CaptureStore | None = None,
    stop_after: str | None = None,
) -> tuple[PassRecord, ...]:
    """Run the passes of a build, or those up to ``stop_after``, for their records' sake; see :func:`build`."""
    return _Build(source, shape, sites, variant, rank, arenas, store=store).passes(stop_after)[2]


@dataclass(frozen=True)
class _Build:
    """What :func:`build` was asked for."""

    source: Source
    shape: ProgramShape
    sites: Sequence[Site]
    variant: Variant
    rank: int
    arenas: Arenas
    example_inputs: object = None
    store: CaptureStore | None = None
    exports: ExportCache | None = None
    cuts: Cuts = "sites"
    grouped: bool = False
    lower: Lower = lower_eager

    def passes(self, stop_after: str | None = None) -> tuple[fx.GraphModule, PassContext, tuple[PassRecord, ...]]:
        """Run every pass, or those up to one."""
        source, shape, inputs = self.source, self.shape, self.source.example_inputs
        if self.example_inputs is not None:
            inputs = normalise_inputs(self.example_inputs)
        _check_request(source, shape, self.variant)
        captured = _captured(source, shape, self.arenas, inputs, self.store, self.exports)
        gm = copy_graph(captured.graph)
        ordered = sorted(self.sites, key=lambda site: site.order)
        if source.kind == "module":
            ordered = at_this_shape(gm, ordered)
        ctx = PassContext(
            kind=source.kind,
            shape=shape,
            dtype=source.dtype,
            sites=tuple(ordered),
            variant=self.variant,
            rank=self.rank,
            lower=self.lower,
            cuts=self.cuts,
            grouped=self.grouped,
            origin=_origin(source, inputs, self.arenas),
        )
        stages = [stage for stage in _BUILD if self.grouped or stage.name not in _GROUPED]
        records = _up_to(captured.records, stop_after)
        if stop_after not in [record.name for record in captured.records]:
            gm, records = run_passes(gm, _up_to(stages, stop_after), ctx, records)
        record_build(Trace(source.model_type, (shape.rows, shape.query, shape.keep), self.variant, records, versions()))
        return gm, ctx, records


_Named = TypeVar("_Named", Stage, PassRecord)


def _up_to(named: Sequence[_Named], last: str | None) -> tuple[_Named, ...]:
    """The stages or records up to the one of this name; all where there is none."""
    names = [each.name for each in named]
    return tuple(named[: names.index(last) + 1] if last in names else named)


def _captured(
    source: Source,
    shape: ProgramShape,
    arenas: Arenas,
    inputs: Inputs | None,
    store: CaptureStore | None,
    exports: ExportCache | None = None,
) -> Captured:
    """Export and annotate one shape, or take it from the store or from disk."""
    key: object = (shape.rows, shape.query, tuple((k.shape, v.shape) for k, v in arenas))
    if source.kind == "module":
        assert inputs is not None
        key = flatten_inputs(inputs)[1]
    if store is not None and key in store.captured:
        return store.captured[key]
    with source.lock:
        name = None if exports is None else export_key(source, shape, arenas)
        captured = None if exports is None or name is None else exports.load(name, source.clone)
        if captured is None:
            captured = _export(source, shape, arenas, inputs)
            if exports is not None and name is not None:
                exports.save(name, captured, source.clone)
    if store is not None:
        store.captured[key] = captured
    return captured


def _export(source: Source, shape: ProgramShape, arenas: Arenas, inputs: Inputs | None) -> Captured:
    """Export and annotate one shape; the caller holds the source's lock."""
    if source.kind == "module":
        assert inputs is not None
        stages = [
            Stage("capture", "captured", partial(capture_module, source=source, inputs=inputs)),
            Stage("annotate", "annotated", annotate),
        ]
    else:
        stages = [
            Stage("capture", "captured", partial(capture_step, source=source, arenas=arenas)),
            Stage("annotate", "annotated", annotate),
            Stage("roles", "annotated", partial(assign_roles, clone=source.clone)),
        ]
    ctx = PassContext(source.kind, shape, source.dtype, origin=_origin(source, inputs, arenas))
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    empty.graph.output(())
    return Captured(*run_passes(empty, stages, ctx))


def _origin(source: Source, inputs: Inputs | None, arenas: Arenas) -> Origin:
    """What a report of a failing pass says about where the program comes from."""
    module = source.clone if source.kind == "module" else None
    size = (arenas[0][0].shape[0] - 1, arenas[0][0].shape[2] - 1) if arenas else (1, 1)
    return Origin(source.model_type, source.config, module, inputs, size)


_BUILD = (
    Stage("head", "headed", head),
    Stage("projections", "headed", projections),
    Stage("residuals", "headed", residuals),
    Stage("steer", "steered", steer),
    Stage("split", "split", split),
    Stage("yields", "yielded", yields),
    Stage("lower", "lowered", lower),
)

#: The passes that bring in our own linear layers.
_GROUPED = ("projections", "residuals")

#: Names of the passes of a build, in order; a language model has them all, but for ``projections`` and ``residuals``.
PASSES = ("capture", "annotate", "roles", *(stage.name for stage in _BUILD))


def _check_request(source: Source, shape: ProgramShape, variant: Variant) -> None:
    if source.kind == "module":
        if variant != "plain":
            raise InvalidValue(
                f"variant {variant!r}: plain modules have no steering tables; assign to stop.value instead."
            )
        return
    if shape.rows < 1 or shape.query < 1 or not 1 <= shape.keep <= shape.query:
        raise InvalidValue(f"{shape}: rows and query must be positive and keep between 1 and query.")


def _telling_shape(source: Source) -> ProgramShape:
    """Rows and query that no other size of the model equals, so that layouts can be told apart."""
    if source.kind == "module":
        return ProgramShape(0, 0, 0)
    sizes = {int(dim) for tensor in source.clone.parameters() for dim in tensor.shape}
    sizes |= {size for spec in source.kv for size in (spec.heads, spec.key_dim, spec.value_dim)}
    sizes |= {value for value in source.config.values() if isinstance(value, int)}
    rows = 3
    query = next(q for q in range(5, 1000, 2) if q not in sizes and rows * q not in sizes)
    return ProgramShape(rows, query, query)


def _small_arenas(source: Source) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Arenas just large enough to be captured with."""
    return [
        (
            torch.empty(2, spec.heads, 2, spec.key_dim, dtype=source.dtype, device=source.device),
            torch.empty(2, spec.heads, 2, spec.value_dim, dtype=source.dtype, device=source.device),
        )
        for spec in source.kv
    ]


def _program(gm: fx.GraphModule, ctx: PassContext, records: tuple[PassRecord, ...]) -> Program:
    """Collect what the passes stamped on the split graph."""
    inputs = placeholders(gm)
    weights = {name: node.meta[WEIGHT] for name, node in inputs.items() if WEIGHT in node.meta and node.users}
    segments = tuple(_segment(gm, index, call, weights) for index, call in enumerate(segment_calls(gm)))
    return Program(
        shape=ctx.shape,
        variant=ctx.variant,
        sites=ctx.sites,
        segments=segments,
        weights=weights,
        inputs=tuple(describe(node) for node in inputs.values() if WEIGHT not in node.meta),
        outputs=tuple(node.meta[ENV] for node in results(gm)),
        records=records,
        rebuild=gm.meta.get(REBUILD),
    )


def _segment(gm: fx.GraphModule, index: int, call: fx.Node, weights: dict[str, torch.Tensor]) -> Segment:
    graph = gm.get_submodule(str(call.target))
    assert isinstance(graph, fx.GraphModule)
    site: Site | None = call.meta[CUT]
    return Segment(
        index=index,
        name=str(call.target),
        run=call.meta[RUN],
        graph=graph,
        inputs=call.meta[INPUTS],
        outputs=call.meta[OUTPUTS],
        site=site,
        live=call.meta[LIVE],
        layer=site.layer if site is not None else None,
        weights=tuple(name for name in call.meta[INPUTS] if name in weights),
        compile_class=call.meta[CLASS],
    )
