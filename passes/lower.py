"""Pass 8, lower: every segment becomes a callable, equal segments share a class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import WEIGHT, ready, storage_of, val
from djinn_fx.passes.yields import segment_calls

RUN = "djinn_run"
CLASS = "djinn_class"


def lower_eager(graph: fx.GraphModule) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Run a segment as it is, op by op."""
    forward: Callable[..., tuple[torch.Tensor, ...]] = ready(graph).forward
    return forward


def lower(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Lower each segment with ``ctx.lower`` and stamp its class."""
    make = ctx.lower or lower_eager
    for call in segment_calls(gm):
        part = gm.get_submodule(str(call.target))
        assert isinstance(part, fx.GraphModule)
        call.meta[CLASS] = compile_class(part)
        call.meta[RUN] = make(part)
    return gm


def compile_class(gm: fx.GraphModule) -> str:
    """A hash equal for graphs that differ in names and in the values of their inputs only.

    It holds the ops and their literals, and every input's shape, stride, dtype, device, kind (weight
    or not) and which inputs share storage.
    """
    numbers: dict[fx.Node, str] = {}
    storages: dict[int | None, int] = {}
    digest = hashlib.sha256()
    for index, node in enumerate(gm.graph.nodes):
        numbers[node] = f"%{index}"
        text = f"{node.op}:"
        if node.op == "placeholder":
            shared = storages.setdefault(storage_of(node), index)
            text += f"{_tensor(val(node))} {WEIGHT in node.meta} {shared}"
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
            text += f"{node.target if node.op != 'output' else ''} {args!r} {kwargs!r}"
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def _tensor(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
