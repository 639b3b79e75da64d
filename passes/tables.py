"""From the names on a graph's nodes to the table of sites, and back to nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import fx

from djinn_fx.errors import InternalError
from djinn_fx.passes.annotate import ABSENT
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import MODULE, NAMES, shape_of, tensor_of
from djinn_fx.passes.marks import INPUT
from djinn_fx.passes.roles import KEPT
from djinn_fx.sites import Site, SiteTable
from djinn_fx.specs import ProgramShape

Layout = Literal["rows", "flat", "heads"]

#: Which of several roles of one value gives the site its name.
_RANK = (
    *("embed", "resid_post", "resid_mid", "resid_pre", "final_norm", "logits"),
    *("attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "mlp_act", "mlp_out"),
)


def site_table(gm: fx.GraphModule, ctx: PassContext) -> SiteTable:
    """All sites of an annotated graph.

    ``ctx.shape`` must tell rows and query from every other size in the model.
    """
    kind, shape = ctx.kind, ctx.shape
    sites: list[Site] = []
    absent = dict(gm.meta.get(ABSENT, {}))
    for node in gm.graph.nodes:
        names = node.meta.get(NAMES, ())
        value = tensor_of(node)
        if not names or value is None:
            continue
        ranks = _RANK if kind == "lm" else ()
        name, *aliases = sorted(names, key=partial(_preference, ranks=ranks))
        dims = tuple(value.shape)
        layout: Layout | None = "rows"
        feature = dims
        if kind == "lm":
            layout, feature = _layout(dims, shape)
        if layout is None:
            reason = f"its value {list(dims)} does not hold one vector per row and position"
            absent |= dict.fromkeys(names, reason)
            continue
        role, _, layer = name.partition(".")
        is_role = role in ranks
        sites.append(
            Site(
                name=name,
                order=len(sites),
                feature_shape=feature,
                axis="whole" if kind == "module" else "kept" if KEPT in node.meta else "query",
                layer=int(layer) if is_role and layer else None,
                role=role if is_role else None,
                aliases=tuple(aliases),
                module=node.meta[MODULE],
                dtype=None if value.dtype == ctx.dtype else value.dtype,
                layout=layout,
            )
        )
    return SiteTable(tuple(sites), absent)


def _preference(name: str, ranks: Sequence[str]) -> tuple[int, int, int]:
    """Roles first, in a fixed order; then outputs before inputs, outer modules before inner ones."""
    role = name.partition(".")[0]
    rank = ranks.index(role) if role in ranks else len(ranks)
    return rank, int(name.endswith(INPUT)), name.count(".")


def _layout(dims: tuple[int, ...], shape: ProgramShape) -> tuple[Layout | None, tuple[int, ...]]:
    """How a value holds rows and positions, and what it holds for each."""
    rows, query = shape.rows, shape.query
    if len(dims) >= 3 and dims[:2] == (rows, query):
        return "rows", dims[2:]
    if len(dims) >= 2 and dims[0] == rows * query:
        return "flat", dims[1:]
    if len(dims) == 4 and (dims[0], dims[2]) == (rows, query):
        return "heads", (dims[1], dims[3])
    return None, ()


def at_this_shape(gm: fx.GraphModule, sites: Iterable[Site]) -> list[Site]:
    """Sites of a plain module with the shapes that their values have in this graph."""
    nodes = nodes_of(gm, sites)
    return [replace(site, feature_shape=shape_of(nodes[site.name])) for site in sites]


def nodes_of(gm: fx.GraphModule, sites: Iterable[Site]) -> dict[str, fx.Node]:
    """The node of each site, by site name.

    Raises:
        InternalError: a site that this graph has not, although another shape's graph had it.
    """
    by_name = {name: node for node in gm.graph.nodes for name in node.meta.get(NAMES, ())}
    lost = [site.name for site in sites if site.name not in by_name]
    if lost:
        raise InternalError(f"sites {', '.join(lost)} are missing in the graph of this shape")
    return {site.name: by_name[site.name] for site in sites}
