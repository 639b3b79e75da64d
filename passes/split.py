"""Pass 6, split: cut the graph behind each chosen site."""

from __future__ import annotations

import operator

from torch import fx, nn

from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import CUT, ENV, ORIGIN, compute_nodes, identifier, lazy_module, output_of
from djinn_fx.passes.joints import is_product, joints
from djinn_fx.program import LOGITS
from djinn_fx.sites import Site

INPUTS = "djinn_inputs"
OUTPUTS = "djinn_outputs"


def split(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Cut behind every site; the result calls one submodule per segment, in the original order.

    A segment's call node carries its site (or None), the environment names it reads and makes. With
    other ``ctx.cuts`` the segments end elsewhere, and none at a site.
    """
    name_values(gm, ctx)
    owner: dict[fx.Node, int] = {}
    sites: list[Site | None] = []
    at_sites = ctx.cuts in ("sites", "both")
    ends = joints(gm) if ctx.cuts in ("layers", "both") else set()
    if at_sites:
        ends = _between(gm, ends)
    current = 0
    for node in compute_nodes(gm):
        source = node.args[0] if node.target is operator.getitem else None
        owner[node] = owner[source] if isinstance(source, fx.Node) else current
        if node in ends or (CUT in node.meta and at_sites):
            sites.append(node.meta.get(CUT) if at_sites else None)
            current += 1
    if current in owner.values() or not sites:
        sites.append(None)
    parts: list[list[fx.Node]] = [[] for _ in sites]
    for node, index in owner.items():
        parts[index].append(node)
    return _assemble(gm, parts, sites, owner)


def _between(gm: fx.GraphModule, ends: set[fx.Node]) -> set[fx.Node]:
    """The joints behind which something is multiplied before the next site: at the others the site's cut will do.

    Which they are must not depend on the variant, since a chunk may go on in a richer one.
    """
    kept = set(ends)
    last: fx.Node | None = None
    for node in compute_nodes(gm):
        if node in ends:
            last = node
        elif is_product(node):
            last = None
        if CUT in node.meta and last is not None:
            kept.discard(last)
    return kept


def name_values(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Give every value its environment name: the site's, ``logits``, or ``v.<origin>``."""
    if ctx.kind == "lm":
        result = output_of(gm).all_input_nodes[0]
        result.meta.setdefault(ENV, LOGITS)
    taken = {node.meta[ENV] for node in gm.graph.nodes if ENV in node.meta}
    for node in compute_nodes(gm):
        if ENV not in node.meta:
            name = f"v.{node.meta[ORIGIN]}"
            while name in taken:  # a site may be called so: the module v.12
                name += "_"
            node.meta[ENV] = name


def _assemble(
    gm: fx.GraphModule,
    parts: list[list[fx.Node]],
    sites: list[Site | None],
    owner: dict[fx.Node, int],
) -> fx.GraphModule:
    """The parent graph: the same placeholders, one call per segment, the same output."""
    root, parent = nn.Module(), fx.Graph()
    outer: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            outer[node] = parent.node_copy(node)
    for index, (nodes, site) in enumerate(zip(parts, sites, strict=True)):
        name = f"segment_{index}"
        inputs, outputs = _boundary(nodes, owner, index, site)
        root.add_module(name, _segment(nodes, inputs, outputs))
        call = parent.call_module(name, tuple(outer[node] for node in inputs))
        call.meta.update(
            {
                CUT: site,
                INPUTS: tuple(node.meta[ENV] for node in inputs),
                OUTPUTS: tuple(node.meta[ENV] for node in outputs),
            }
        )
        for rank, node in enumerate(outputs):
            item = parent.call_function(operator.getitem, (call, rank))
            item.meta = dict(node.meta)
            outer[node] = item
    parent.output(fx.map_arg(output_of(gm).args[0], outer.__getitem__))
    result = lazy_module(parent, root)
    result.meta.update(gm.meta)
    return result


def _boundary(
    nodes: list[fx.Node], owner: dict[fx.Node, int], index: int, site: Site | None
) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a segment reads from outside, and which of its values are used after it."""
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    outputs: list[fx.Node] = []
    for node in nodes:
        inputs.update(dict.fromkeys(n for n in node.all_input_nodes if n not in inside))
        later = any(owner.get(user, index + 1) > index for user in node.users)
        if later or (site is not None and node.meta[ENV] == site.name):
            outputs.append(node)
    return list(inputs), outputs


def _segment(nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    inner: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        inner[node] = graph.placeholder(identifier(node.meta[ENV]))
        inner[node].meta = dict(node.meta)
    for node in nodes:
        inner[node] = graph.node_copy(node, inner.__getitem__)
    graph.output(tuple(inner[node] for node in outputs))
    return lazy_module(graph)
