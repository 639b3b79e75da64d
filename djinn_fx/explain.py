"""A program explained in text: its passes, its segments and what crosses each yield point."""

from __future__ import annotations

from djinn_fx.program import Program, Segment


def explain(program: Program) -> str:
    """A summary of a program for a terminal."""
    shape = program.shape
    lines = [f"program {shape.rows} row(s) x {shape.query} token(s), variant {program.variant}"]
    lines += ["", "passes"]
    for record in program.records:
        change = f"{len(record.before):5d} -> {len(record.after):5d} nodes"
        lines.append(
            f"  {record.index:2d} {record.name:10s} {change}  {record.seconds * 1e3:7.1f} ms  {record.verdict}"
        )
    lines += ["", "segments"]
    classes: dict[str, int] = {}
    for segment in program.segments:
        group = classes.setdefault(segment.compile_class, len(classes))
        lines.append(_segment(segment, group))
    lines.append(f"{len(program.segments)} segments, {len(classes)} structurally different")
    return "\n".join(lines)


def _segment(segment: Segment, group: int) -> str:
    nodes = sum(node.op == "call_function" for node in segment.graph.graph.nodes)
    crossing = sum(value.nbytes for value in segment.live)
    where = f"stops after {segment.site.name}" if segment.site is not None else "ends"
    names = ", ".join(f"{value.name} {list(value.shape)}" for value in segment.live)
    return (
        f"  {segment.index:3d} class {group}  {nodes:4d} ops  {len(segment.weights):3d} weights  "
        f"{crossing:8d} B live  {where}" + (f"  ({names})" if names else "")
    )
