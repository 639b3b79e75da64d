"""Traces as text: graphs as Python that one can read, what a pass did, and a summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from djinn_fx.inspecting.changes import Where, changes, check_layer, find_pass, find_sites, wanted
from djinn_fx.inspecting.fold import Block, Line, blocks, diff_lines, graph_lines
from djinn_fx.inspecting.names import Names, form, input_name, remark
from djinn_fx.passes.trace import Trace
from djinn_fx.program import LiveInfo, NodeInfo, PassRecord, SegmentInfo

#: Column at which remarks begin, if the code is shorter.
COLUMN = 84
#: Unchanged lines kept around a change.
CONTEXT = 2

_MARKS = {"made": "+ ", "removed": "- ", "changed": "+ "}


@dataclass(frozen=True)
class Asked:
    """What of a trace is shown.

    Attributes:
        where: after which passes.
        after: after this pass only.
        diff: what each pass did in place of the graph it made.
        layer: this layer only.
        site: these sites only, with what they read and who reads them.
    """

    where: Where = "change"
    after: str | None = None
    diff: bool = False
    layer: int | None = None
    site: str | None = None


def render(trace: Trace, asked: Asked) -> str:
    """The graphs or diffs of a trace.

    Raises:
        InvalidValue, UnknownSite: a pass, layer or site that is not there; with the nearest.
    """
    if asked.layer is not None:
        check_layer(trace, asked.layer)
    sites = None if asked.site is None else find_sites(trace, asked.site)
    chosen = trace.records if asked.after is None else (find_pass(trace, asked.after),)
    parts, did = [], changes(trace)
    for record in chosen:
        what = did[record.index]
        head = f"# == pass {record.index}: {record.name} == {what}; {record.verdict}"
        shown = what.any or asked.where == "all" or asked.after is not None
        if not shown:
            parts.append(head)
            continue
        parts.append("\n".join([head, *record_text(record, asked, sites)]))
    return "\n\n".join(parts)


def heading(trace: Trace) -> str:
    """What was built, in a line."""
    rows, query, keep = trace.shape
    shape = f"{rows} row(s) x {query} token(s), {keep} kept, " if rows else ""
    made = ", ".join(f"{name} {version}" for name, version in trace.versions.items())
    return f"{trace.model}: {shape}variant {trace.variant} ({made})"


def failure_text(trace: Trace) -> str:
    """Of a trace that ended in a failure: the graph before it, the message, and where the repro script is."""
    failure = trace.failure
    assert failure is not None
    parts = [f"# the graph before {failure.name}, which failed"]
    if trace.records:
        last = trace.records[-1]
        parts += record_text(last, Asked())
    parts += [
        "",
        f"pass {failure.name!r} failed: {failure.message}",
        f"The graph before it, the traceback and a script that fails in the same way: {failure.folder}",
        f"python {failure.folder}/repro.py",
    ]
    return "\n".join(parts)


def record_text(record: PassRecord, asked: Asked, sites: frozenset[str] | None = None) -> Iterator[str]:
    """The graph after a pass, or what the pass did."""
    names = Names.of(record.before, record.after) if asked.diff else Names.of(record.after)
    lines = diff_lines(record) if asked.diff else graph_lines(record.after, record.segments)
    inputs = {i.origin: i.target for side in (record.before, record.after) for i in side if i.op == "placeholder"}
    keep = wanted(lines, asked.layer, sites)
    if asked.diff:
        keep = _around(lines, keep)
    if keep is None:
        yield from _input_lines(record.after)
    elif asked.diff and asked.layer is None and sites is None:
        yield from _input_changes(record)
    folded = asked.layer is None
    for block in blocks(lines, inputs, keep, folded=folded):
        yield from block_text(block, names)


def block_text(block: Block, names: Names) -> Iterator[str]:
    """A block, grouped by module."""
    module: str | None = None
    for line in block.lines:
        info = line.node
        if info is None:
            module = None
            yield from _segment_lines(line, names)
            continue
        if info.op != "output" and info.module != module:
            module = info.module
            yield f"  # {module or 'the model itself'}"
        if line.tag == "changed" and line.before is not None:
            yield from _changed(line, names)
        else:
            yield _MARKS.get(line.tag, "  ") + _with_remark(names.statement(info), remark(info))
    if block.equals and block.layer is not None:
        yield f"  # {layers_said(block)}"


def layers_said(block: Block) -> str:
    """Which layers are folded into a block: ``model.layers.2 to 30: identical to model.layers.1``."""
    assert block.layer is not None
    prefix, number = block.layer
    first, last = block.equals[0][1], block.equals[-1][1]
    which = f"layers {first}-{last}" if last > first else f"layer {first}"
    return f"{which} of {prefix}: identical to layer {number}"


def _changed(line: Line, names: Names) -> Iterator[str]:
    """A node that is another now: both statements, or where only its names differ those that came and went."""
    assert line.before is not None
    assert line.after is not None
    old, new = names.statement(line.before), names.statement(line.after)
    was, now = set(line.before.site.split()), set(line.after.site.split())
    moved = [f"+{name}" for name in line.after.site.split() if name not in was]
    moved += [f"-{name}" for name in line.before.site.split() if name not in now]
    same_form = (line.before.shape, line.before.dtype) == (line.after.shape, line.after.dtype)
    if old == new and same_form:
        text = form(line.after.dtype, line.after.shape)
        yield "~ " + _with_remark(new, "  ".join([text, "named " + " ".join(moved)] if moved else [text]))
        return
    yield "- " + _with_remark(old, remark(line.before))
    yield "+ " + _with_remark(new, remark(line.after))


def _segment_lines(line: Line, names: Names) -> Iterator[str]:
    segment = line.segment
    assert segment is not None
    if line.tag == "segment":
        yield ""
        shared = f", compile class {segment.compile_class[:6]}" if segment.compile_class else ""
        yield f"  # -- {segment.name}{shared} --"
        return
    if not segment.live and not segment.site:
        return
    where = f"yield {segment.site}" if segment.site else f"{segment.name} ends"
    total = f"{segment.live_bytes:,} bytes alive" if segment.live else "not looked at yet"
    yield f"  # {where}: {total}"
    for value in segment.live:
        yield f"  #   {live_said(value, names)}"


def live_said(value: LiveInfo, names: Names) -> str:
    """A live value: its name, form, bytes and who made it."""
    maker = names.by_origin.get(value.origin)
    by = value.made_by or "the model itself"
    by += f" ({maker.target.removesuffix('.default')})" if maker is not None and maker.op == "call_function" else ""
    alias = f", shares the storage of {value.alias_of}" if value.alias_of else ""
    said = names.value(value.origin) if value.name.startswith("v.") else value.name
    return f"{said}  {form(value.dtype, value.shape)}  {value.nbytes:,} bytes, made by {by}{alias}"


def _with_remark(code: str, behind: str) -> str:
    return f"{code:<{COLUMN}}  # {behind}" if behind else code


def _input_lines(infos: Iterable[NodeInfo]) -> Iterator[str]:
    """The inputs of a graph, those of equal layers on one line."""
    for text, count in folded_inputs(infos):
        yield f"  # input {text}" + (f"  x {count}" if count > 1 else "")


def folded_inputs(infos: Iterable[NodeInfo]) -> list[tuple[str, int]]:
    """Inputs in order, each with its form; those that differ in a layer's number only are one, with their count."""
    counts: dict[str, int] = {}
    for info in infos:
        if info.op == "placeholder":
            said = f"{input_name(_any_layer(info.target))}  {form(info.dtype, info.shape)}"
            counts[said] = counts.get(said, 0) + 1
    return list(counts.items())


def _any_layer(env: str) -> str:
    """An environment name with the number of its layer replaced by a star."""
    pieces = env.split(".")
    for index, piece in enumerate(pieces):
        number = piece.partition(":")[0]
        if index and number.isdigit():
            pieces[index] = "*" + piece[len(number) :]
            break
    return ".".join(pieces)


def _input_changes(record: PassRecord) -> Iterator[str]:
    """Inputs that a pass added or dropped."""
    before, after = ({i.origin for i in side if i.op == "placeholder"} for side in (record.before, record.after))
    for mark, side, other in (("-", record.before, after), ("+", record.after, before)):
        for text, count in folded_inputs(info for info in side if info.origin not in other):
            yield f"{mark} # input {text}" + (f"  x {count}" if count > 1 else "")


def _around(lines: list[Line], keep: list[int] | None) -> list[int]:
    """Indices of changed lines with some around them, among those wanted."""
    told = [i for i, line in enumerate(lines) if line.tag in ("made", "removed", "changed")]
    near = {j for i in told for j in range(i - CONTEXT, i + CONTEXT + 1) if 0 <= j < len(lines)}
    segments = {i for i, line in enumerate(lines) if line.segment is not None and not told}
    return sorted((near | segments) & set(range(len(lines)) if keep is None else keep))


def segment_nodes(record: PassRecord) -> dict[str, int]:
    """Number of ops in each segment, by the segment's name."""
    counts: dict[str, int] = {}
    current = ""
    for info in record.after:
        if info.op == "call_module":
            current = info.target
        elif info.op == "call_function" and current:
            counts[current] = counts.get(current, 0) + 1
    return counts


def classes(segments: Iterable[SegmentInfo]) -> dict[str, int]:
    """A small number for each compile class, in the order in which they come."""
    found: dict[str, int] = {}
    for segment in segments:
        found.setdefault(segment.compile_class, len(found))
    return found
