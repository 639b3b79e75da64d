"""Records of what the passes did: text only, so that they cost little and outlive the graphs."""

from __future__ import annotations

from torch import fx

from djinn_fx.passes.graph import ENV, MODULE, NAMES, ORIGIN, SITE, tensor_of
from djinn_fx.program import NodeInfo


def snapshot(gm: fx.GraphModule) -> tuple[NodeInfo, ...]:
    """Describe every node of a graph, and of the segments inside it, in order; each origin once.

    What only takes a segment's results apart is left out: those values are described inside the segment.
    """
    infos: list[NodeInfo] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.args and getattr(node.args[0], "op", "") == "call_module":
            continue
        infos.append(node_info(node))
        if node.op == "call_module":
            part = gm.get_submodule(str(node.target))
            assert isinstance(part, fx.GraphModule)
            infos += [node_info(inner) for inner in part.graph.nodes if inner.op == "call_function"]
    return tuple(infos)


def node_info(node: fx.Node) -> NodeInfo:
    """Describe one node."""
    value = tensor_of(node)
    site = node.meta.get(SITE)
    return NodeInfo(
        origin=node.meta.get(ORIGIN, 0),
        name=node.name,
        op=node.op,
        target=node.meta.get(ENV, "") if node.op == "placeholder" else str(node.target),
        args=", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]),
        module=node.meta.get(MODULE, ""),
        site=site.name if site is not None else " ".join(node.meta.get(NAMES, ())),
        shape="" if value is None else str(list(value.shape)),
        dtype="" if value is None else str(value.dtype).removeprefix("torch."),
    )


def as_text(infos: tuple[NodeInfo, ...]) -> str:
    """One line per node, for dumps and for reading."""
    return "\n".join(
        f"{info.origin:6d} {info.name} = {info.target}({info.args}) "
        f"{info.dtype}{info.shape} {info.module} {info.site}".rstrip()
        for info in infos
    )
