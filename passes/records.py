"""Records of what the passes did: text only, so that they cost little and outlive the graphs."""

from __future__ import annotations

from typing import Any

from torch import fx

from djinn_fx.passes.graph import CUT, ENV, MODULE, NAMES, ORIGIN, SITE, WEIGHT, placeholders, tensor_of
from djinn_fx.passes.lower import CLASS
from djinn_fx.passes.split import INPUTS, OUTPUTS
from djinn_fx.passes.yields import LIVE, segment_calls
from djinn_fx.program import LiveInfo, NodeInfo, SegmentInfo, ValueSpec
from djinn_fx.sites import Site


def snapshot(gm: fx.GraphModule) -> tuple[NodeInfo, ...]:
    """Describe every node of a graph, and of the segments inside it, in order; each origin once.

    What only takes a segment's results apart is left out: those values are described inside the segment.
    """
    infos: list[NodeInfo] = []
    calls = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.args and getattr(node.args[0], "op", "") == "call_module":
            continue
        if node.op != "call_module":
            infos.append(node_info(node))
            continue
        calls += 1
        infos.append(node_info(node, -calls))
        part = gm.get_submodule(str(node.target))
        assert isinstance(part, fx.GraphModule)
        infos += [node_info(inner) for inner in part.graph.nodes if inner.op == "call_function"]
    return tuple(infos)


def node_info(node: fx.Node, origin: int | None = None) -> NodeInfo:
    """Describe one node.

    Args:
        node: the node.
        origin: where it carries none.
    """
    value = tensor_of(node)
    meta = node.meta
    site = meta.get(SITE)
    return NodeInfo(
        origin=meta.get(ORIGIN, 0) if origin is None else origin,
        name=node.name,
        op=node.op,
        target=meta.get(ENV, "") if node.op == "placeholder" else str(node.target),
        args=_arguments(node),
        module=meta.get(MODULE, ""),
        site=site.name if site is not None else " ".join(meta.get(NAMES, ())),
        shape="" if value is None else str(list(value.shape)),
        dtype="" if value is None else str(value.dtype).removeprefix("torch."),
    )


def segments_of(gm: fx.GraphModule) -> tuple[SegmentInfo, ...]:
    """Describe the segments of a graph; none before it is cut."""
    calls = segment_calls(gm)
    if not calls:
        return ()
    weights = {name: node.meta[WEIGHT] for name, node in placeholders(gm).items() if WEIGHT in node.meta}
    makers = {node.meta[ENV]: node.meta.get(ORIGIN, 0) for node in gm.graph.nodes if ENV in node.meta}
    found = []
    for call in calls:
        site: Site | None = call.meta.get(CUT)
        read = [name for name in call.meta[INPUTS] if name in weights]
        found.append(
            SegmentInfo(
                name=str(call.target),
                site=site.name if site is not None else "",
                layer=site.layer if site is not None else None,
                inputs=call.meta[INPUTS],
                outputs=call.meta[OUTPUTS],
                weights=len(read),
                weight_bytes=sum(weights[name].nbytes for name in read),
                live=tuple(_live(spec, makers) for spec in call.meta.get(LIVE, ())),
                compile_class=call.meta.get(CLASS, ""),
            )
        )
    return tuple(found)


def _live(spec: ValueSpec, makers: dict[str, int]) -> LiveInfo:
    dtype = str(spec.dtype).removeprefix("torch.")
    origin = makers.get(spec.name, 0)
    return LiveInfo(spec.name, str(list(spec.shape)), dtype, spec.nbytes, spec.made_by, origin, spec.alias_of)


def _arguments(node: fx.Node) -> str:
    """A node's arguments as Python; of an input none."""
    if node.op == "placeholder":
        return ""
    return ", ".join([*map(_argument, node.args), *(f"{key}={_argument(each)}" for key, each in node.kwargs.items())])


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.meta.get(ORIGIN, 0)}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_argument, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def as_text(infos: tuple[NodeInfo, ...]) -> str:
    """One line per node, for dumps and for reading."""
    return "\n".join(
        f"{info.origin:6d} {info.name} = {info.target}({info.args}) "
        f"{info.dtype}{info.shape} {info.module} {info.site}".rstrip()
        for info in infos
    )
