"""Pass 5, steer: each chosen site gets its layout, its edits, its injection and its tap."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from djinn_fx.passes.annotate import drop_dead
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import (
    CUT,
    ENV,
    MODULE,
    SITE,
    Emitter,
    add_input,
    aten,
    fake_mode,
    placeholders,
    shape_of,
    val,
)
from djinn_fx.passes.residuals import LINEAR_RESIDUAL
from djinn_fx.passes.tables import nodes_of
from djinn_fx.sites import Site
from djinn_fx.specs import ACTIVATIONS, edit_tables


def steer(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Put at every chosen site what ``ctx.variant`` asks for.

    ``plain``: the value in the site's layout. ``armed``: scale, add, injection and tap. ``rank``: rank
    edits as well. Whoever used the value uses the result.
    """
    nodes = nodes_of(gm, ctx.sites)
    start: fx.Node | None = None
    for site in ctx.sites:
        node = nodes[site.name]
        if node.op == "placeholder":
            start = _steer_site(gm, ctx, site, node, start or _last_input(gm))
        else:
            _steer_site(gm, ctx, site, node, node)
    drop_dead(gm, keep_named=False)
    return gm


def _steer_site(gm: fx.GraphModule, ctx: PassContext, site: Site, node: fx.Node, after: fx.Node) -> fx.Node:
    """Steer one site behind ``after``; returns the last node added, or ``node``."""
    users = list(node.users)
    emit = Emitter(gm, after, node.meta[MODULE])
    value = _to_site(emit, ctx, site, node)
    tables = _tables(gm, ctx, site)
    last = value
    if tables:
        if value.target is LINEAR_RESIDUAL:
            value = _edited_within(emit, ctx, value, tables)
        else:
            value = _injected(emit, _rank_edited(emit, ctx, _edited(emit, value, tables), tables), tables)
        last = emit(aten.copy_.default, tables["tap"], value)
    value.meta.update({ENV: site.name, SITE: site})
    last.meta[CUT] = site
    result = _from_site(emit, site, value, node)
    if result is not value:
        # It may cross later cuts: named alike in every variant, since a step may go on in a richer one.
        result.meta[ENV] = f"{site.name}:model"
    for user in users:
        user.replace_input_with(node, result)
    return emit.made[-1] if emit.made else node


def _last_input(gm: fx.GraphModule) -> fx.Node:
    return list(placeholders(gm).values())[-1]


def _to_site(emit: Emitter, ctx: PassContext, site: Site, node: fx.Node) -> fx.Node:
    """The value in the site's layout, contiguous, as a node of its own or as ``node`` itself."""
    value = node
    if site.layout == "heads":
        value = emit(aten.transpose.int, value, 1, 2)
    elif site.layout == "flat":
        tokens = shape_of(node)[0] // ctx.shape.rows
        value = emit(aten.view.default, value, [ctx.shape.rows, tokens, *site.feature_shape])
    if node.op == "placeholder":
        return emit(aten.clone.default, value, memory_format=torch.contiguous_format)
    if not val(value).is_contiguous():
        value = emit(aten.contiguous.default, value)
    return value


def _from_site(emit: Emitter, site: Site, value: fx.Node, node: fx.Node) -> fx.Node:
    """The value as the model's own graph wants it."""
    if site.layout == "heads":
        return emit(aten.transpose.int, value, 1, 2)
    if site.layout == "flat":
        return emit(aten.view.default, value, list(shape_of(node)))
    return value


def _tables(gm: fx.GraphModule, ctx: PassContext, site: Site) -> Mapping[str, fx.Node]:
    """The site's tables as new inputs, by their part (``"act"``, ``"scale"``, ...)."""
    tables: dict[str, fx.Node] = {}
    mode = fake_mode(gm)
    device = next(val(n).device for n in gm.graph.nodes if n.op == "placeholder")
    for spec in edit_tables(site, ctx.shape, ctx.variant, ctx.dtype, ctx.rank):
        with mode:
            fake = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        tables[spec.name.rpartition(":")[2]] = add_input(gm, spec.name, fake)
    return tables


def _edited_within(emit: Emitter, ctx: PassContext, value: fx.Node, tables: Mapping[str, fx.Node]) -> fx.Node:
    """Let the op that makes the value edit it too: rank edits alone, which read the whole row, come behind it."""
    edits = [tables[part] for part in ("act", "scale", "add")]
    if ctx.variant == "armed":
        value.args = (*value.args[:5], *edits, tables["inject"], tables["tap"], [])
        return value
    value.args = (*value.args[:5], *edits, None, None, [tables["read"], tables["write"]])
    return _injected(emit, _rank_edited(emit, ctx, value, tables), tables)


def _injected(emit: Emitter, value: fx.Node, tables: Mapping[str, fx.Node]) -> fx.Node:
    """The value, or what stands in its tap by now."""
    return emit(aten.where.self, tables["inject"], tables["tap"], value)


def _edited(emit: Emitter, value: fx.Node, tables: Mapping[str, fx.Node]) -> fx.Node:
    """``where(act, round(round(x * scale) + add), x)``, each step in the wide dtype."""
    scaled = emit(aten.mul.Tensor, _widened(emit, value, tables), tables["scale"])
    scaled = _rounded(emit, scaled, value)
    added = emit(aten.add.Tensor, _widened(emit, scaled, tables), tables["add"])
    return emit(aten.where.self, tables["act"], _rounded(emit, added, value), value)


def _widened(emit: Emitter, value: fx.Node, tables: Mapping[str, fx.Node]) -> fx.Node:
    wide = val(tables["scale"]).dtype
    return value if val(value).dtype == wide else emit(aten.to.dtype, value, wide)


def _rounded(emit: Emitter, value: fx.Node, like: fx.Node) -> fx.Node:
    dtype = val(like).dtype
    return value if val(value).dtype == dtype else emit(aten.to.dtype, value, dtype)


def _rank_edited(emit: Emitter, ctx: PassContext, value: fx.Node, tables: Mapping[str, fx.Node]) -> fx.Node:
    """``where(rank_act, round(h + sum_j delta_j write_j), x)``, one slot after the other; ``value`` without slots."""
    if ctx.variant != "rank":
        return value
    rows, tokens = shape_of(value)[:2]
    wide = _widened(emit, value, tables)
    flat = emit(aten.reshape.default, wide, [rows, tokens, -1])
    change: fx.Node | None = None
    for slot in range(ctx.rank):
        part = _slot_change(emit, flat, tables, slot)
        change = part if change is None else emit(aten.add.Tensor, change, part)
    if change is None:
        return value
    moved = emit(aten.add.Tensor, flat, change)
    moved = emit(aten.reshape.default, moved, list(shape_of(value)))
    return emit(aten.where.self, tables["rank_act"], _rounded(emit, moved, value), value)


def _slot_change(emit: Emitter, flat: fx.Node, tables: Mapping[str, fx.Node], slot: int) -> fx.Node:
    """What one slot adds, ``[rows, tokens, width]``; exactly 0 where the slot is unused.

    The read-out is a product and a sum, not a matrix product: its bits must not depend on the batch.
    """

    def column(part: str) -> fx.Node:
        chosen = emit(aten.select.int, tables[part], 1, slot)
        return emit(aten.unsqueeze.default, chosen, 1)

    used = column("slot")
    product = emit(aten.mul.Tensor, flat, column("read"))
    total = emit(aten.sum.dim_IntList, product, [2])
    before = emit(aten.add.Tensor, total, column("bias"))
    now = _activated(emit, before, column("kind"), column("threshold"))
    target = emit(aten.maximum.default, now, column("low"))
    target = emit(aten.minimum.default, target, column("high"))
    delta = emit(aten.mul.Tensor, emit(aten.sub.Tensor, target, now), column("strength"))
    step = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, delta, 2), column("write"))
    zero = emit(aten.zeros_like.default, step)
    return emit(aten.where.self, emit(aten.unsqueeze.default, used, 2), step, zero)


def _activated(emit: Emitter, value: fx.Node, kind: fx.Node, threshold: fx.Node) -> fx.Node:
    """Linear, relu or jumprelu, by the slot's kind."""
    is_relu = emit(aten.eq.Scalar, kind, ACTIVATIONS["relu"])
    is_jump = emit(aten.eq.Scalar, kind, ACTIVATIONS["jumprelu"])
    zero = emit(aten.zeros_like.default, value)
    above = emit(aten.gt.Tensor, value, threshold)
    jumped = emit(aten.where.self, above, value, zero)
    active = emit(aten.where.self, is_relu, emit(aten.relu.default, value), value)
    return emit(aten.where.self, is_jump, jumped, active)
