"""What every pass knows of a graph: the keys of node metadata, which ops are views, how to add a node.

Conventions of a captured graph. A placeholder carries its environment name (:data:`ENV`); a compute
node carries its origin (:data:`ORIGIN`, a number stamped once at capture), the path of the module that
made it (:data:`MODULE`) and the names of the sites it is the value of (:data:`NAMES`). A weight's
placeholder holds the tensor itself (:data:`WEIGHT`). ``meta["val"]`` is always the fake value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module

ORIGIN = "djinn_origin"
ENV = "djinn_env"
MODULE = "djinn_module"
NAMES = "djinn_names"
SITE = "djinn_site"
CUT = "djinn_cut"
WEIGHT = "djinn_weight"
REBUILD = "djinn_rebuild"
NEXT = "djinn_next_origin"

aten = torch.ops.aten

#: Ops whose result holds the same numbers in the same order: one may look through them.
RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.detach.default,
        aten.squeeze.dim,
        aten.unsqueeze.default,
    }
)
#: Ops that change the dtype only.
CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
#: Ops that make a list of views.
LISTS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.tensor_split.sections,
    }
)


def is_op(node: object) -> bool:
    """Whether ``node`` calls a function (an aten or djinn op, or ``getitem``)."""
    return isinstance(node, fx.Node) and node.op == "call_function"


def val(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta["val"]


def tensor_of(node: fx.Node) -> FakeTensor | None:
    """The fake tensor of a node, or None if it makes something else."""
    value = node.meta.get("val")
    return value if isinstance(value, FakeTensor) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The static shape of a node's tensor."""
    return tuple(int(dim) for dim in val(node).shape)


def is_activation(node: object) -> bool:
    """Whether ``node`` is a floating point tensor that is computed, not a weight or an input."""
    if not is_op(node):
        return False
    value = tensor_of(cast(fx.Node, node))
    return value is not None and value.dtype.is_floating_point


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """The arguments that an op writes to in place, by its schema."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        found += [value] if isinstance(value, fx.Node) else []
        if isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, fx.Node)]
    return found


def is_impure(node: fx.Node) -> bool:
    """Whether a node must stay although nobody uses its value."""
    return node.op in ("placeholder", "output") or bool(mutated_inputs(node))


def storage_of(node: fx.Node) -> int | None:
    """Identity of the storage behind a node's fake tensor; equal for views of one another."""
    value = tensor_of(node)
    return None if value is None else int(value.untyped_storage()._cdata)


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode in which the values of a graph live."""
    for node in gm.graph.nodes:
        value = tensor_of(node)
        if value is not None:
            return value.fake_mode
    raise ValueError("a graph without tensors has no fake mode")


def placeholders(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The placeholders of a graph by environment name."""
    return {node.meta[ENV]: node for node in gm.graph.nodes if node.op == "placeholder"}


def output_of(gm: fx.GraphModule) -> fx.Node:
    """The output node."""
    last: fx.Node = next(iter(reversed(gm.graph.nodes)))
    return last


def results(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The nodes that the graph returns."""
    returned: Any = output_of(gm).args[0]
    return tuple(returned)


def take_origin(gm: fx.GraphModule) -> int:
    """An origin that no node of the graph has yet."""
    if NEXT not in gm.meta:
        gm.meta[NEXT] = 1 + max((node.meta.get(ORIGIN, 0) for node in gm.graph.nodes), default=0)
    gm.meta[NEXT] += 1
    return int(gm.meta[NEXT]) - 1


def propagate(node: fx.Node, mode: FakeTensorMode) -> None:
    """Recompute a node's fake value from its arguments' fake values."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), val)
    with mode, torch.no_grad():
        node.meta["val"] = cast(Callable[..., Any], node.target)(*args, **kwargs)


class Emitter:
    """Adds nodes to a graph, one after the other, with fake values and fresh origins.

    Args:
        gm: the graph.
        after: the node behind which the first new node goes.
        module: module path for the new nodes.
    """

    def __init__(self, gm: fx.GraphModule, after: fx.Node, module: str) -> None:
        self._gm = gm
        self._last = after
        self._module = module
        self._mode = fake_mode(gm)
        self.made: list[fx.Node] = []

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call of ``op`` and return its node."""
        with self._gm.graph.inserting_after(self._last):
            node = self._gm.graph.call_function(op, args, kwargs)
        node.meta.update({ORIGIN: take_origin(self._gm), MODULE: self._module, NAMES: ()})
        propagate(node, self._mode)
        self._last = node
        self.made.append(node)
        return node


def add_input(gm: fx.GraphModule, env: str, value: torch.Tensor) -> fx.Node:
    """Add a placeholder behind the others; ``value`` is its fake tensor."""
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(identifier(env))
    node.meta.update({ENV: env, ORIGIN: take_origin(gm), MODULE: "", NAMES: (), "val": value})
    return node


def lazy_module(graph: fx.Graph, root: torch.nn.Module | None = None) -> fx.GraphModule:
    """A module around a graph whose Python code is made when it is first called; most graphs never are.

    Args:
        graph: the graph.
        root: holds the submodules that it calls.
    """
    return _LazyGraphModule(root if root is not None else torch.nn.Module(), graph)


def unwritten() -> AbstractContextManager[None]:
    """While it is entered, torch too makes the Python code of a traced graph when it is first called.

    An export writes and compiles that code after every pass of its own, five times, and nobody calls it.
    """
    return _use_lazy_graph_module(True)


def ready(gm: fx.GraphModule) -> fx.GraphModule:
    """The same module, its Python code made: a call then goes straight to it."""
    _LazyGraphModule.force_recompile(gm)
    return gm


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own nodes; fake values and weights are shared."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    copied = lazy_module(graph)
    copied.meta.update(gm.meta)
    return copied


def identifier(name: str) -> str:
    """A Python identifier that reads like ``name``."""
    return "x_" * (not name[:1].isalpha()) + re.sub(r"\W", "_", name)


def ancestors(node: fx.Node, stop: Sequence[fx.Node] = ()) -> set[fx.Node]:
    """Every node that ``node`` is computed from, itself included; the walk ends at ``stop``."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += [] if current in stop else current.all_input_nodes
    return seen


def descendants(node: fx.Node) -> set[fx.Node]:
    """Every node that is computed from ``node``, itself included."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += list(current.users)
    return seen


def compute_nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that compute something, in order."""
    return (node for node in gm.graph.nodes if node.op not in ("placeholder", "output", "get_attr"))
