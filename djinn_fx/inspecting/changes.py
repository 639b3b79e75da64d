"""What a pass did, counted by origin; and which parts of a trace somebody asks for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from djinn_fx.errors import InvalidValue
from djinn_fx.inspecting.fold import Line, differs, layer_of
from djinn_fx.inspecting.names import has_role, references
from djinn_fx.passes.trace import Trace
from djinn_fx.program import NodeInfo, PassRecord, SegmentInfo
from djinn_fx.sites import Site, SiteTable


@dataclass(frozen=True)
class Change:
    """What a pass did to the nodes of a graph, by origin; inputs count too.

    Attributes:
        made: nodes that were not there.
        removed: nodes that are gone.
        replaced: nodes whose readers now read another one, and which; they may be gone or still be there.
        changed: nodes that are there as before, with another op, arguments, form or name.
        segments: whether more is known of the segments than before.
    """

    made: tuple[int, ...]
    removed: tuple[int, ...]
    replaced: tuple[tuple[int, int], ...]
    changed: tuple[int, ...]
    segments: bool = False

    @property
    def any(self) -> bool:
        """Whether the pass changed anything."""
        return bool(self.made or self.removed or self.replaced or self.changed or self.segments)

    def __str__(self) -> str:
        parts = {"made": self.made, "removed": self.removed, "replaced": self.replaced, "changed": self.changed}
        said = [f"{len(part)} {name}" for name, part in parts.items() if part]
        return ", ".join(said + ["segments described"] * self.segments) or "no change"


def changes(trace: Trace) -> list[Change]:
    """What each pass did."""
    found, known = [], tuple[SegmentInfo, ...]()
    for record in trace.records:
        found.append(replace(change(record), segments=record.segments != known))
        known = record.segments
    return found


def change(record: PassRecord) -> Change:
    """What one pass did to its graph's nodes."""
    before, after = ({info.origin: info for info in side if info.origin > 0} for side in (record.before, record.after))
    result = [({i.origin: i for i in side if i.op == "output"}) for side in (record.before, record.after)]
    made = tuple(origin for origin in after if origin not in before)
    removed = tuple(origin for origin in before if origin not in after)
    changed, replaced = [], dict[int, int]()
    for origin, old in (before | result[0]).items():
        new = (after | result[1]).get(origin)
        if new is None or not differs(old, new):
            continue
        if origin > 0:
            changed.append(origin)
        one, two = references(old.args), references(new.args)
        if len(one) == len(two):
            replaced.update((x, y) for x, y in zip(one, two, strict=True) if x != y)
    return Change(made, removed, tuple(sorted(replaced.items())), tuple(changed))


def find_pass(trace: Trace, name: str) -> PassRecord:
    """The record of a pass.

    Raises:
        InvalidValue: no such pass ran; names the nearest.
    """
    for record in trace.records:
        if record.name == name:
            return record
    names = [record.name for record in trace.records]
    near = difflib.get_close_matches(name, names, n=2)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise InvalidValue(f"no pass {name!r} ran here; {hint}the passes are {', '.join(names)}.")


def site_names(trace: Trace) -> tuple[str, ...]:
    """Every name of a value that the trace knows, those with a role first."""
    found = dict.fromkeys(name for record in trace.records for info in record.after for name in info.site.split())
    return tuple(sorted(found, key=lambda name: not has_role(name)))


def find_sites(trace: Trace, pattern: str) -> frozenset[str]:
    """The names that a name, a role or a glob stands for.

    Raises:
        UnknownSite: with the nearest names.
    """
    names = enumerate(site_names(trace))
    table = SiteTable(tuple(Site(name, order, (), role=name if has_role(name) else None) for order, name in names))
    return frozenset(site.name for site in table.select(pattern))


def layers(trace: Trace) -> tuple[int, ...]:
    """Numbers of all layers."""
    found = {layer_of(info.module) for record in trace.records for info in record.after}
    return tuple(sorted({layer[1] for layer in found if layer is not None}))


def check_layer(trace: Trace, layer: int) -> None:
    """Raise InvalidValue where the model has no such layer; the message says which there are."""
    known = layers(trace)
    if layer not in known:
        span = f"layers are {known[0]} to {known[-1]}" if known else "this model has no numbered layers"
        raise InvalidValue(f"no layer {layer} in {trace.model}; {span}.")


def wanted(lines: Sequence[Line], layer: int | None, sites: frozenset[str] | None) -> list[int] | None:
    """Indices of the lines of a layer, or of sites with what they read and who reads them; None: all.

    Args:
        lines: of a graph or of a diff.
        layer: number of a layer.
        sites: names of values.
    """
    if layer is None and sites is None:
        return None
    chosen = set(range(len(lines)))
    if layer is not None:
        chosen = {i for i, line in enumerate(lines) if _number(line) == layer}
        ends = {line.segment.name: i for i, line in enumerate(lines) if line.tag == "yield" and line.segment}
        chosen |= {i for name, i in ends.items() if lines[i].segment is not None and _layer(lines[i]) == layer}
    if sites is not None:
        chosen &= _near(lines, sites)
    return sorted(chosen)


def _number(line: Line) -> int | None:
    found = layer_of(line.node.module) if line.node is not None else None
    return None if found is None else found[1]


def _layer(line: Line) -> int | None:
    return line.segment.layer if line.segment is not None else None


def _near(lines: Sequence[Line], sites: frozenset[str]) -> set[int]:
    """Lines that make a value of one of the sites, what those read, and who reads it."""

    def named(info: NodeInfo | None) -> bool:
        return info is not None and not sites.isdisjoint(info.site.split())

    centre = {i for i, line in enumerate(lines) if named(line.before) or named(line.after)}
    own = {line.node.origin for i in centre if (line := lines[i]).node is not None}
    read = {ref for i in centre for info in (lines[i].before, lines[i].after) if info for ref in references(info.args)}
    found = set(centre)
    for index, line in enumerate(lines):
        if line.node is not None and (line.node.origin in read or not own.isdisjoint(references(line.node.args))):
            found.add(index)
        if line.segment is not None and line.segment.site in sites:
            found.add(index)
    return found


def steered(record: PassRecord) -> dict[str, tuple[bool, bool]]:
    """For each site with tables: whether it can be edited, and whether it is tapped."""
    found: dict[str, tuple[bool, bool]] = {}
    for info in record.after:
        if info.op == "placeholder":
            site, _, part = info.target.rpartition(":")
            if site and part in ("scale", "tap"):
                edited, tapped = found.get(site, (False, False))
                found[site] = (edited or part == "scale", tapped or part == "tap")
    return found


Where = Literal["change", "all", "none"]


def segments_at_end(trace: Trace) -> tuple[SegmentInfo, ...]:
    """The segments after the last pass that ran."""
    return trace.records[-1].segments if trace.records else ()
