"""Copying an exported graph flat: regions that only switch gradients or autocast off are inlined."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from djinn_fx.errors import CaptureError
from djinn_fx.passes.graph import lazy_module

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def flatten_graph(exported: fx.GraphModule) -> fx.GraphModule:
    """A flat copy of an exported graph, with nodes of its own.

    Raises:
        CaptureError: the graph holds control flow, or a region under an enabled autocast.
    """
    graph = fx.Graph()
    inputs = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            inputs.append(graph.node_copy(node))
    graph.output(_copy_into(graph, exported, inputs))
    return lazy_module(graph)


def _copy_into(graph: fx.Graph, part: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Copy a graph's compute nodes; its placeholders stand for ``inputs``. Returns its results."""
    values: dict[fx.Node, Any] = {}
    regions: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in part.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            regions[node] = part.get_submodule(str(node.target))
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        elif isinstance(node.target, HigherOrderOperator):
            body, operands = _region(node, regions)
            values[node] = _copy_into(graph, body, [values.get(n, n) for n in operands])
        elif node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    raise AssertionError("a graph without output")


def _region(node: fx.Node, regions: dict[fx.Node, Any]) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Body and operands of a wrapped region that may be inlined."""
    name = getattr(node.target, "__name__", str(node.target))
    if name == _GRAD:
        return regions[node.args[1]], node.args[2:]  # type: ignore[index]
    if name == _AUTOCAST and node.args[2] is False:
        return regions[node.args[4]], node.args[5:]  # type: ignore[index]
    if name == _AUTOCAST:
        raise CaptureError(
            f"the model enables autocast to {node.args[1]} inside its forward. Cast the weights with model.to(dtype) "
            "and remove the autocast region."
        )
    raise CaptureError(
        f"the model contains {name} (control flow inside the graph), which cannot be cut into segments. "
        "Choose the branch outside the model, or compile a submodule that does not contain it."
    )
