"""Pass 4, head: only the positions whose logits are asked for reach the head."""

from __future__ import annotations

import torch
from torch import fx

from djinn_fx.passes.annotate import drop_dead
from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import (
    MODULE,
    NAMES,
    Emitter,
    add_input,
    aten,
    compute_nodes,
    descendants,
    fake_mode,
    output_of,
    propagate,
    shape_of,
    val,
)
from djinn_fx.passes.roles import KEPT
from djinn_fx.program import KEEP


def head(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Gather the positions ``keep`` ``[rows, keep]`` before the head, where ``keep < query``.

    The gather stands between ``final_norm`` and the head; where that is not possible it stands at the
    logits, which gives the same values for more work.
    """
    shape = ctx.shape
    if ctx.kind != "lm" or shape.keep == shape.query:
        return gm
    mode = fake_mode(gm)
    with mode:
        index = torch.empty(shape.rows, shape.keep, dtype=torch.long, device=_device(gm))
    keep = add_input(gm, KEEP, index)
    logits = output_of(gm).all_input_nodes[0]
    norm = next((n for n in gm.graph.nodes if "final_norm" in n.meta.get(NAMES, ())), None)
    if norm is None or not _gather_before_head(gm, norm, keep, logits):
        gathered = _gather(gm, logits, keep)
        gathered.meta[NAMES], logits.meta[NAMES] = logits.meta[NAMES], ()
        logits.replace_all_uses_with(gathered, lambda user: user.op == "output")
    return gm


def _device(gm: fx.GraphModule) -> torch.device:
    device: torch.device = val(output_of(gm).all_input_nodes[0]).device
    return device


def _gather(gm: fx.GraphModule, value: fx.Node, keep: fx.Node) -> fx.Node:
    """``value[b, keep[b]]`` for every row, behind ``value``."""
    emit = Emitter(gm, value, value.meta[MODULE])
    width = shape_of(value)[2]
    index = emit(aten.unsqueeze.default, keep, 2)
    index = emit(aten.expand.default, index, [*shape_of(keep), width])
    return emit(aten.gather.default, value, 1, index)


def _gather_before_head(gm: fx.GraphModule, norm: fx.Node, keep: fx.Node, logits: fx.Node) -> bool:
    """Try the gather behind ``norm``; whether the rest of the graph took the new shape."""
    path = [user for user in norm.users if KEPT in user.meta]
    if len(shape_of(norm)) != 3 or not path:
        return False
    gathered = _gather(gm, norm, keep)
    for user in path:
        user.replace_input_with(norm, gathered)
    mode = fake_mode(gm)
    reached = descendants(gathered) - {gathered}
    below = [node for node in compute_nodes(gm) if node in reached]
    saved = {node: val(node) for node in below}
    try:
        for node in below:
            propagate(node, mode)
    except (RuntimeError, ValueError):
        pass  # a size of the uncut graph is written into it
    if shape_of(logits)[:2] == shape_of(keep):
        return True
    for user in path:
        user.replace_input_with(gathered, norm)
    for node, value in saved.items():
        node.meta["val"] = value
    drop_dead(gm, keep_named=True)
    return False
