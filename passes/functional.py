"""Marks and in-place writes leave the graph: every value keeps its meaning, nothing changes afterwards.

A tapped or stored activation must never be changed by an op that runs later, and a segment that runs
twice must not write twice. So the graph is rewritten in one walk: a write becomes the value after the
write, and views taken before it are taken again from that value when they are next used. The KV arenas
alone are written in place. A mark is the value it marks; it leaves its name on that value as it is at
that moment.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from djinn_fx.errors import CaptureError
from djinn_fx.passes.graph import (
    ENV,
    LISTS,
    MODULE,
    NAMES,
    ORIGIN,
    WEIGHT,
    aten,
    fake_mode,
    lazy_module,
    mutated_inputs,
    propagate,
    storage_of,
    take_origin,
    val,
)
from djinn_fx.passes.marks import MARK
from djinn_fx.passes.scatter import scattered

_KV_WRITE = "djinn.kv_write.default"

#: What these give shares storage with their argument, or does not, other than tracing noted.
_MISTOLD = {"aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default"}
_MISTOLD |= {"aten.lift_fresh.default", "aten.lift_fresh_copy.default"}


@dataclass(eq=False)
class Base:
    """A piece of storage: the value it holds now, and how often it was written."""

    value: fx.Node
    version: int = 0


@dataclass(eq=False)
class View:
    """How an old node is got from its base: the old nodes of the views on the way, outermost last."""

    base: Base
    chain: tuple[fx.Node, ...] = ()
    made: fx.Node | None = None
    version: int = 0


class Rewriter:
    """One walk over a captured graph, building the graph without writes and marks."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._graph = fx.Graph()
        self._views: dict[fx.Node, View] = {}
        # New nodes whose fake values are not those that tracing noted, nor are therefore those of their users.
        self._anew: set[fx.Node] = set()
        self._mode = fake_mode(gm)

    def run(self) -> fx.GraphModule:
        """The rewritten graph."""
        for node in self._gm.graph.nodes:
            if node.op == "output":
                self._graph.output(fx.map_arg(node.args[0], self.current))
            elif node.target is MARK:
                self._mark(node)
            elif mutated_inputs(node) and str(node.target) != _KV_WRITE:
                self._write(node)
            else:
                self._copy(node)
        result = lazy_module(self._graph)
        result.meta.update(self._gm.meta)
        return result

    def current(self, node: fx.Node) -> fx.Node:
        """The new node that holds what ``node`` holds now."""
        view = self._views[node]
        if not view.chain:
            return view.base.value
        if view.made is None or view.version != view.base.version:
            value = view.base.value
            for step in view.chain:
                args = (value, *fx.map_arg(step.args[1:], self.current))
                value = self._call(step, step.target, args, dict(step.kwargs))
            view.made, view.version = value, view.base.version
        return view.made

    def _mark(self, node: fx.Node) -> None:
        marked = node.args[0]
        assert isinstance(marked, fx.Node)
        value = self.current(marked)
        value.meta[NAMES] = tuple(dict.fromkeys([*value.meta[NAMES], str(node.args[1])]))
        self._views[node] = self._views[marked]

    def _copy(self, node: fx.Node) -> None:
        """Take over a node that writes nothing; note whether it is a view of its first argument."""
        made = self._graph.node_copy(node, self.current)
        made.meta = dict(node.meta)
        if node.op != "placeholder" and self._is_new(node, made):
            self._tell(made)
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and self._is_view(node, made, source):
            old = self._views[source]
            self._views[node] = View(old.base, (*old.chain, node), made, old.base.version)
        else:
            self._views[node] = View(Base(made))

    def _is_new(self, node: fx.Node, made: fx.Node) -> bool:
        """Whether a copy's fake value must be computed, which takes as long as to trace it."""
        if node.meta.get("val") is None or str(node.target) in _MISTOLD:
            return True
        return not self._anew.isdisjoint(made.all_input_nodes)

    def _tell(self, made: fx.Node) -> None:
        propagate(made, self._mode)
        self._anew.add(made)

    def _is_view(self, node: fx.Node, made: fx.Node, source: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target in LISTS or node.target is operator.getitem:
            return node.target in LISTS or source.target in LISTS
        taken = made.args[0]
        assert isinstance(taken, fx.Node)
        storage = storage_of(made)
        return storage is not None and storage == storage_of(taken)

    def _write(self, node: fx.Node) -> None:
        """Replace an in-place op by its functional twin and give its base the new value."""
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or mutated_inputs(node) != [target]:
            raise self._refusal(node, "writes to several tensors or to an output argument")
        twin = functional_twin(node.target)
        if twin is None:
            raise self._refusal(node, "has no out-of-place form")
        view = self._views[target]
        self._check_base(node, view.base)
        before = self.current(target)
        args = (before, *fx.map_arg(node.args[1:], self.current))
        after = self._call(node, twin, args, fx.map_arg(dict(node.kwargs), self.current))
        if val(after).dtype != val(before).dtype:
            after = self._call(node, aten.to.dtype, (after, val(before).dtype), {})
        view.base.value = self._through(node, view, after)
        view.base.version += 1
        if not view.chain:
            after = view.base.value
        view.made, view.version = after, view.base.version
        self._views[node] = view

    def _through(self, node: fx.Node, view: View, after: fx.Node) -> fx.Node:
        """Write ``after`` through a chain of views: the new value of the base."""
        if not view.chain:
            return after
        values = [view.base.value]
        for step in view.chain[:-1]:
            args = (values[-1], *fx.map_arg(step.args[1:], self.current))
            values.append(self._call(step, step.target, args, dict(step.kwargs)))

        def emit(op: Callable[..., Any], *args: Any) -> fx.Node:
            return self._call(node, op, args, {})

        for step, below in zip(reversed(view.chain), reversed(values), strict=True):
            made = scattered(step, below, after, emit)
            if made is None:
                raise self._refusal(node, f"writes through a view made by {step.target}")
            after = made
        return after

    def _check_base(self, node: fx.Node, base: Base) -> None:
        written = base.value
        env = written.meta.get(ENV, "")
        if WEIGHT in written.meta and env.startswith("w."):
            raise self._refusal(node, f"writes to the model's own {env.removeprefix('w.')!r}")

    def _call(self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Add a call in the place of ``like``, with its module."""
        made = self._graph.call_function(target, args, kwargs)
        made.meta.update({MODULE: like.meta[MODULE], NAMES: (), ORIGIN: take_origin(self._gm)})
        self._tell(made)
        return made

    def _refusal(self, node: fx.Node, what: str) -> CaptureError:
        return CaptureError(
            f"module {node.meta[MODULE] or 'forward'!r}: the in-place op {node.target} {what}. A program keeps no "
            "state but the KV arenas and never changes a value afterwards; write that line out of place."
        )


def functional_twin(target: Any) -> OpOverload | None:
    """The op that computes what an in-place op writes: ``add`` for ``add_``."""
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    name = target.overloadpacket.__name__
    if not name.endswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    twin = getattr(packet, target._overloadname, None)
    return twin if isinstance(twin, OpOverload) and not twin._schema.is_mutable else None
