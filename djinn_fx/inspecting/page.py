"""A trace as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from importlib import resources
from typing import Any

from djinn_fx.inspecting.changes import changes, segments_at_end, site_names, steered
from djinn_fx.inspecting.fold import Block, Line, blocks, diff_lines
from djinn_fx.inspecting.names import Names, remark
from djinn_fx.inspecting.text import classes, folded_inputs, layers_said, live_said, segment_nodes
from djinn_fx.passes.trace import Trace
from djinn_fx.program import PassRecord

_FOLDER = "data/inspecting"


def page(trace: Trace) -> str:
    """The page of a trace."""
    folder = resources.files("djinn_fx").joinpath(_FOLDER)
    parts = {name: folder.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    said = json.dumps(document(trace), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    found = parts["html"].replace("{{title}}", html.escape(f"{trace.model}: passes"))
    # The data last: whatever it holds is not searched for places to fill.
    return found.replace("{{css}}", parts["css"]).replace("{{js}}", parts["js"]).replace("{{data}}", said)


def document(trace: Trace) -> dict[str, Any]:
    """What the page shows, as plain data; equal layers are folded."""
    did = changes(trace)
    return {
        "model": trace.model,
        "shape": list(trace.shape),
        "variant": trace.variant,
        "versions": dict(trace.versions),
        "failure": None if trace.failure is None else asdict(trace.failure),
        "passes": [
            {
                "name": record.name,
                "stage": record.stage,
                "seconds": record.seconds,
                "verdict": record.verdict,
                "before": len(record.before),
                "after": len(record.after),
                "said": str(what),
                "made": len(what.made),
                "removed": len(what.removed),
                "replaced": len(what.replaced),
                "changed": len(what.changed),
                "any": what.any,
                "inputs": _inputs(record),
                "blocks": _blocks(record),
            }
            for record, what in zip(trace.records, did, strict=True)
        ],
        "segments": _segments(trace),
        "sites": _sites(trace),
    }


def _inputs(record: PassRecord) -> list[list[Any]]:
    """Inputs that a pass added (``+``) or dropped (``-``), folded."""
    before, after = ({i.origin for i in side if i.op == "placeholder"} for side in (record.before, record.after))
    found: list[list[Any]] = []
    for mark, side, other in (("-", record.before, after), ("+", record.after, before)):
        new = [info for info in side if info.origin not in other]
        found += [[mark, text, count] for text, count in folded_inputs(new)]
    return found


def _blocks(record: PassRecord) -> list[dict[str, Any]]:
    names = (Names.of(record.before), Names.of(record.after))
    inputs = {i.origin: i.target for side in (record.before, record.after) for i in side if i.op == "placeholder"}
    return [_block(block, *names) for block in blocks(diff_lines(record), inputs)]


def _block(block: Block, before: Names, after: Names) -> dict[str, Any]:
    found: dict[str, Any] = {"lines": [_line(line, before, after) for line in block.lines]}
    if block.layer is not None:
        found["prefix"], found["layer"] = block.layer
        found["equals"] = [number for _, number in block.equals]
        if block.equals:
            found["fold"] = layers_said(block)
    return found


def _line(line: Line, before: Names, after: Names) -> dict[str, Any]:
    """One line: its tag and module, and for each side that has one its code and remark."""
    if line.segment is not None:
        segment = line.segment
        if line.tag == "segment":
            shared = f", compile class {segment.compile_class[:6]}" if segment.compile_class else ""
            return {"t": "segment", "n": segment.name, "r": segment.name + shared}
        where = f"yield {segment.site}" if segment.site else f"{segment.name} ends"
        return {"t": "yield", "n": segment.name, "r": where, "v": [live_said(value, after) for value in segment.live]}
    node = line.node
    assert node is not None
    found: dict[str, Any] = {"t": line.tag, "m": "" if node.op == "output" else node.module or "the model itself"}
    for side, info, names in (("l", line.before, before), ("r", line.after, after)):
        if info is not None:
            found[side] = names.statement(info)
            found[f"{side}r"] = remark(info)
    if found.get("l") == found.get("r"):
        del found["l"]  # said once
        if found["lr"] == found["rr"]:
            del found["lr"]
    if node.site:
        found["s"] = node.site.split()
    return found


def _segments(trace: Trace) -> list[dict[str, Any]]:
    if not trace.records:
        return []
    last = trace.records[-1]
    counts, names = segment_nodes(last), Names.of(last.after)
    numbers = classes(last.segments)
    tables = steered(last)
    costs = {cost.name: asdict(cost) for cost in trace.costs}
    return [
        {
            "name": segment.name,
            "site": segment.site,
            "layer": segment.layer,
            "nodes": counts.get(segment.name, 0),
            "weights": segment.weights,
            "weight_bytes": segment.weight_bytes,
            "bytes": segment.live_bytes,
            "live": [live_said(value, names) for value in segment.live],
            "class": numbers[segment.compile_class],
            "edited": tables.get(segment.site, (False, False))[0],
            "tapped": tables.get(segment.site, (False, False))[1],
            "cost": costs.get(segment.name),
            "code": trace.code.get(segment.name),
        }
        for segment in last.segments
    ]


def _sites(trace: Trace) -> list[list[Any]]:
    """Every name of a value with the index of the segment that makes it; -1 where there are no segments."""
    where: dict[str, int] = {}
    current = -1
    for info in trace.records[-1].after if trace.records else ():
        if info.op == "call_module":
            current += 1
        for name in info.site.split():
            where.setdefault(name, current)
    for index, segment in enumerate(segments_at_end(trace)):
        if segment.site:
            where[segment.site] = index
    return [[name, where.get(name, -1)] for name in site_names(trace)]
