"""The summary of a trace as tables, for a terminal, a notebook or a reader of text."""

from __future__ import annotations

from dataclasses import dataclass

from djinn_fx import views
from djinn_fx.inspecting.changes import changes, segments_at_end
from djinn_fx.inspecting.text import classes, segment_nodes
from djinn_fx.passes.trace import SegmentCost, Trace
from djinn_fx.program import SegmentInfo


@dataclass(frozen=True)
class Table(views.Table):
    """A table whose cells are all text."""

    rows: tuple[tuple[str, ...], ...]


def tables(trace: Trace) -> list[Table]:
    """What each pass did, and the segments if the trace got so far."""
    found = [_passes(trace)]
    if segments_at_end(trace):
        found.append(_segments(trace))
    return found


def _passes(trace: Trace) -> Table:
    rows = [
        (
            str(record.index),
            record.name,
            f"{len(record.before):,} -> {len(record.after):,}",
            str(what),
            f"{record.seconds * 1e3:,.1f} ms",
            record.verdict,
        )
        for record, what in zip(trace.records, changes(trace), strict=True)
    ]
    columns = ("", "pass", "nodes", "what it did", "time", "checked")
    note = "" if trace.failure is None else f"{trace.failure.name} failed: {trace.failure.message}"
    return Table("passes", columns, (False, True, False, True, False, True), tuple(rows), note)


def _segments(trace: Trace) -> Table:
    """One row a segment; neighbours that differ in their layer only share one, unless they were measured."""
    segments = segments_at_end(trace)
    nodes, numbers = segment_nodes(trace.records[-1]), classes(segments)
    costs = {cost.name: cost for cost in trace.costs}
    runs: list[list[int]] = []
    for index, segment in enumerate(segments):
        known = not costs and runs and _alike(segments[runs[-1][-1]], segment, nodes)
        if known:
            runs[-1].append(index)
        else:
            runs.append([index])
    rows = []
    for run in runs:
        first, last = segments[run[0]], segments[run[-1]]
        several = len(run) > 1
        row = (
            f"{run[0]}-{run[-1]}" if several else str(run[0]),
            "" if first.layer is None else f"{first.layer}-{last.layer}" if several else str(first.layer),
            f"{first.site} to {last.site}" if several and first.site else first.site or "-",
            str(nodes.get(first.name, 0)),
            f"{first.weights}",
            f"{first.weight_bytes:,}",
            f"{first.live_bytes:,}",
            str(numbers[first.compile_class]) if first.compile_class else "-",
        )
        rows.append(row + (_cost(costs[first.name]) if costs else ()))
    columns: tuple[str, ...] = (
        "segment",
        "layer",
        "ends at",
        "nodes",
        "weights",
        "weight bytes",
        "live bytes",
        "class",
    )
    if costs:
        columns += ("us", "kernels", "fusions lost", "arming us")
    left = tuple(name == "ends at" for name in columns)
    note = f"{len(segments)} segments, {len(numbers)} structurally different: segments of one class share a compilation"
    return Table("segments", columns, left, tuple(rows), note)


def _alike(one: SegmentInfo, two: SegmentInfo, nodes: dict[str, int]) -> bool:
    """Whether two neighbours are equal but for their layer."""

    def form(segment: SegmentInfo) -> tuple[object, ...]:
        own = (segment.weights, segment.weight_bytes, segment.live_bytes, segment.compile_class)
        return (*own, nodes.get(segment.name), segment.site.partition(".")[0], segment.layer is None)

    return bool(one.compile_class) and form(one) == form(two)


def _cost(cost: SegmentCost) -> tuple[str, ...]:
    lost = "" if cost.fusions_lost is None else f"{'<= ' if cost.at_most else ''}{cost.fusions_lost}"
    arming = "" if cost.arming is None else f"{cost.arming:+.1f}"
    return f"{cost.microseconds:.1f}", str(cost.kernels), lost, arming
