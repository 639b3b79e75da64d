"""The code that Inductor generates for a segment, and what it calls."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from djinn_fx.errors import InvalidValue
from djinn_fx.passes.graph import copy_graph, lazy_module
from djinn_fx.passes.inductor import InductorLowering
from djinn_fx.program import Program, Segment

#: A line of generated code that launches something: a C++ or Triton kernel, a library's product, an op of ours.
_LAUNCH = re.compile(
    r"^\s+(?:(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|(?:torch\.ops\.|aten\.)[\w.]+)|\w+\.run)\("
)


def find_segment(program: Program, wanted: str) -> Segment:
    """The segment of a number, a name (``segment_3``) or a site (``resid_post.3``).

    Raises:
        InvalidValue: there is none; the message lists them.
    """
    for segment in program.segments:
        known = {str(segment.index), segment.name}
        if wanted in known or (segment.site is not None and wanted in (segment.site.name, *segment.site.aliases)):
            return segment
    last = program.segments[-1].index
    sites = [segment.site.name for segment in program.segments if segment.site is not None]
    span = f"sites {sites[0]} to {sites[-1]}" if sites else "no sites"
    raise InvalidValue(f"no segment {wanted!r}: they are numbered 0 to {last}, and end at {span}.")


def generated_code(graph: fx.GraphModule) -> str:
    """The Python module that Inductor generates for a segment's graph; ``""`` for one that computes nothing.

    Raises:
        InvalidValue: it cannot be compiled here, for want of a C++ compiler as a rule.
    """
    seen: list[str] = []
    try:
        with _listening(seen), _quiet():
            InductorLowering(options={"force_disable_caches": True})(copy_graph(graph))
    except Exception as error:
        raise InvalidValue(
            f"Inductor cannot compile this segment here: {type(error).__name__}: {str(error).strip()[:300]} "
            "On the CPU it needs a C++ compiler (g++ or clang++) on the PATH."
        ) from error
    return "\n\n".join(seen)


def launches(graph: fx.GraphModule) -> int:
    """How many kernels the code generated for a graph calls."""
    return count_launches(generated_code(graph))


def count_launches(code: str) -> int:
    """How many kernels generated code calls."""
    return sum(_LAUNCH.match(line) is not None for line in code.splitlines() if "assert" not in line)


def joined_launches(one: Segment, two: Segment) -> int:
    """How many kernels two neighbouring segments call when they are compiled as one graph."""
    return launches(joined(one, two))


def joined(one: Segment, two: Segment) -> fx.GraphModule:
    """Two neighbouring segments as one graph; it returns what the second does and what else is alive behind it."""
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    both = [*one.inputs, *(name for name in two.inputs if name not in one.outputs)]
    nodes: dict[str, fx.Node] = {}
    for segment in (one, two):
        places = (n for n in segment.graph.graph.nodes if n.op == "placeholder")
        nodes.update((name, node) for name, node in zip(segment.inputs, places, strict=True) if name not in nodes)
    for name in dict.fromkeys(both):
        env[name] = graph.node_copy(nodes[name])
    alive = {value.name for value in two.live}
    for segment in (one, two):
        mapping: dict[fx.Node, Any] = {}
        given = iter(segment.inputs)
        for node in segment.graph.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = env[next(given)]
            elif node.op == "output":
                returned = fx.map_arg(node.args[0], mapping.__getitem__)
                env.update(zip(segment.outputs, returned, strict=True))
            else:
                mapping[node] = graph.node_copy(node, mapping.__getitem__)
    kept = [name for name in one.outputs if name in alive and name not in two.outputs]
    graph.output(tuple(env[name] for name in [*kept, *two.outputs]))
    return lazy_module(graph)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks that nothing was kept on disk: it should not be."""
    log = logging.getLogger("torch._inductor.standalone_compile")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@contextmanager
def _listening(seen: list[str]) -> Iterator[None]:
    """Keep the code that Inductor generates meanwhile: it hands it to a hook made for that."""
    from torch._inductor.graph import GraphLowering

    before = GraphLowering.save_output_code
    GraphLowering.save_output_code = staticmethod(seen.append)
    try:
        yield
    finally:
        GraphLowering.save_output_code = before
