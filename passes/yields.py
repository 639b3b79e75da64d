"""Pass 7, yields: what must survive each yield point."""

from __future__ import annotations

from torch import fx

from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import CUT, ENV, MODULE, output_of, placeholders, shape_of, storage_of, val
from djinn_fx.passes.split import INPUTS, OUTPUTS
from djinn_fx.program import ValueSpec

LIVE = "djinn_live"


def yields(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Write each boundary's live set on the call node of the segment before it."""
    calls = segment_calls(gm)
    values = {node.meta[ENV]: node for node in gm.graph.nodes if node.op == "call_function"}
    inputs = placeholders(gm)
    for index, call in enumerate(calls):
        names = live_names(gm, calls, index)
        owners: dict[int | None, str] = {}
        specs = []
        for name, node in inputs.items():
            owners[storage_of(node)] = name
        for name in names:
            storage = storage_of(values[name])
            specs.append(describe(values[name], owners.get(storage)))
            owners.setdefault(storage, name)
        call.meta[LIVE] = tuple(specs)
    return gm


def segment_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """The call nodes of the segments, in order."""
    return [node for node in gm.graph.nodes if node.op == "call_module"]


def live_names(gm: fx.GraphModule, calls: list[fx.Node], index: int) -> list[str]:
    """Values made up to segment ``index`` that something after it reads, in the order they were made."""
    needed = {name for call in calls[index + 1 :] for name in call.meta[INPUTS]}
    needed |= {node.meta[ENV] for node in output_of(gm).all_input_nodes}
    site = calls[index].meta[CUT]
    if site is not None:
        needed.add(site.name)
    made = [name for call in calls[: index + 1] for name in call.meta[OUTPUTS]]
    return [name for name in made if name in needed]


def describe(node: fx.Node, alias_of: str | None = None) -> ValueSpec:
    """The description of a value."""
    name = node.meta[ENV]
    made_by = node.meta[MODULE] or (name if node.op == "placeholder" else "")
    return ValueSpec(name, shape_of(node), val(node).dtype, made_by, alias_of)
