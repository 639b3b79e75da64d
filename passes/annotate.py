"""Pass 2, annotate: marks become names, writes become values, and no-ops disappear."""

from __future__ import annotations

import operator

from torch import fx

from djinn_fx.passes.context import PassContext
from djinn_fx.passes.functional import Rewriter
from djinn_fx.passes.graph import (
    CASTS,
    ENV,
    MODULE,
    NAMES,
    aten,
    compute_nodes,
    fake_mode,
    is_impure,
    propagate,
    storage_of,
    tensor_of,
)
from djinn_fx.passes.marks import INPUT

ABSENT = "djinn_absent"

#: Ops that are no-ops where shapes and strides happen to agree.
_SHAPES = frozenset(
    {
        aten.contiguous.default,
        aten.view.default,
        aten.reshape.default,
        aten.expand.default,
    }
)
_NOTHING = frozenset({aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default})
_DROPOUT = frozenset({aten.dropout.default, aten.feature_dropout.default})


def annotate(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
    """Move the marks' names onto the values, drop no-ops and recompute the fake values."""
    gm = Rewriter(gm).run()
    _settle_call_numbers(gm)
    mode = fake_mode(gm)
    stale: set[fx.Node] = set()  # their fake values do not follow from their arguments' any more
    for node in list(compute_nodes(gm)):
        if _is_identity(node):
            if storage_of(node) != storage_of(node.all_input_nodes[0]) or node in stale:
                stale.update(node.users)
            _merge(gm, node)
        elif node in stale:
            propagate(node, mode)
            stale.update(node.users)
    drop_dead(gm, keep_named=True)
    _gather_items(gm)
    _forget_constants(gm)
    return gm


def _forget_constants(gm: fx.GraphModule) -> None:
    """Drop the numbers that fake tensors of small constants carry: nothing after the trace asks for them."""
    for node in gm.graph.nodes:
        value = tensor_of(node)
        if value is not None:
            value.constant = None


def _gather_items(gm: fx.GraphModule) -> None:
    """Move every ``getitem`` right behind the op whose results it takes apart.

    No boundary then lies between an op and its results, so that only tensors cross boundaries.
    """
    for node in list(compute_nodes(gm)):
        last = node
        items = [user for user in node.users if user.target is operator.getitem]
        for item in sorted(items, key=lambda user: int(user.args[1])):  # type: ignore[arg-type, unused-ignore]
            last.append(item)
            last = item


def _merge(gm: fx.GraphModule, node: fx.Node) -> None:
    """Replace a node that changes nothing by its input, which takes over its names."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    names = [*source.meta[NAMES], *node.meta[NAMES]]
    source.meta[NAMES] = tuple(dict.fromkeys(names))
    node.replace_all_uses_with(source)
    gm.graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    """Whether a node's result is its first argument, bit for bit and stride for stride.

    A named view is kept even so: at another shape it may be a value of its own, and a site must stand
    for the same value at every shape.
    """
    if node.target in _NOTHING:
        return True
    if node.target in _DROPOUT:
        return bool(node.args[2] is False or node.args[1] == 0.0)
    known = node.target in CASTS or (node.target in _SHAPES and not node.meta[NAMES])
    if not known or not isinstance(node.args[0], fx.Node) or True in node.args[2:]:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or node.kwargs.get("copy"):
        return False
    return bool(
        (before.shape, before.stride(), before.dtype, before.device)
        == (after.shape, after.stride(), after.dtype, after.device)
    )


def _settle_call_numbers(gm: fx.GraphModule) -> None:
    """Names of modules that are called once lose their ``#1``; the others' bare names are absent."""
    numbers: dict[str, set[str]] = {}
    for node in gm.graph.nodes:
        for name in node.meta.get(NAMES, ()):
            path, _, call = name.removesuffix(INPUT).partition("#")
            numbers.setdefault(path, set()).add(call)
    absent: dict[str, str] = dict(gm.meta.get(ABSENT, {}))
    for node in gm.graph.nodes:
        names = []
        for name in node.meta.get(NAMES, ()):
            path = name.removesuffix(INPUT).partition("#")[0]
            suffix = INPUT if name.endswith(INPUT) else ""
            count = len(numbers[path])
            if count > 1:
                absent[path + suffix] = (
                    f"the module is called {count} times; say which call: {path}#1{suffix} to {path}#{count}{suffix}"
                )
                names.append(name)
            else:
                names.append(path + suffix)
        if ENV in node.meta or MODULE in node.meta:
            node.meta[NAMES] = tuple(names)
    gm.meta[ABSENT] = absent


def drop_dead(gm: fx.GraphModule, *, keep_named: bool) -> None:
    """Remove compute nodes that nobody uses, except those with effects and, if asked, with names."""
    for node in reversed(list(compute_nodes(gm))):
        named = keep_named and bool(node.meta.get(NAMES))
        if not node.users and not named and not is_impure(node):
            gm.graph.erase_node(node)
