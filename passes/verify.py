"""The invariants of each stage: what must hold on a graph after a pass, whoever wrote the pass.

A verifier gets the graph, the context and the record of the graph before the pass. It returns the
verdict for the record, or raises :class:`Breach` saying what does not hold.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from djinn_fx.passes.context import PassContext
from djinn_fx.passes.graph import (
    CUT,
    ENV,
    MODULE,
    NAMES,
    ORIGIN,
    SITE,
    ancestors,
    compute_nodes,
    fake_mode,
    mutated_inputs,
    output_of,
    placeholders,
    propagate,
    results,
    shape_of,
    val,
)
from djinn_fx.passes.lower import CLASS, RUN
from djinn_fx.passes.marks import MARK
from djinn_fx.passes.split import INPUTS, OUTPUTS
from djinn_fx.passes.tables import nodes_of
from djinn_fx.passes.yields import LIVE, segment_calls
from djinn_fx.program import KEEP, NodeInfo
from djinn_fx.specs import edit_tables

Before = tuple[NodeInfo, ...]
Verifier = Callable[[fx.GraphModule, PassContext, Before], str]

_ARENA_WRITE = "djinn.kv_write.default"


class Breach(Exception):
    """An invariant that does not hold; the runner turns it into an InternalError."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise Breach(what)


def captured(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """A flat graph of op calls; every input has a name of its own, every node an origin of its own."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = Counter(node.meta.get(ENV) for node in inputs)
    _require(None not in names, "an input has no environment name")
    _require(max(names.values(), default=1) == 1, f"two inputs share a name: {names.most_common(1)}")
    odd = [node.name for node in compute_nodes(gm) if node.op != "call_function"]
    odd += [node.name for node in gm.graph.nodes if node.op == "get_attr"]
    _require(not odd, f"nodes that are no op calls: {odd}")
    _stamped(gm)
    return f"{len(inputs)} inputs, {sum(1 for _ in compute_nodes(gm))} ops"


def annotated(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """No marks and no writes but to the arenas; every site name stands on one node."""
    _stamped(gm)
    _require(all(node.target is not MARK for node in gm.graph.nodes), "a mark is left")
    written = [n.name for n in compute_nodes(gm) if mutated_inputs(n) and not _writes_arena(n)]
    _require(not written, f"in-place ops are left: {written}")
    owners = Counter(name for node in gm.graph.nodes for name in node.meta.get(NAMES, ()))
    twice = [name for name, count in owners.items() if count > 1]
    _require(not twice, f"names on several nodes: {twice}")
    return f"{len(owners)} names"


def headed(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """The logits have the kept positions, and ``keep`` is an input where it must be."""
    if ctx.kind != "lm":
        return "plain module"
    _stamped(gm)
    wanted = (ctx.shape.rows, ctx.shape.keep)
    logits = output_of(gm).all_input_nodes[0]
    _require(shape_of(logits)[:2] == wanted, f"logits are {shape_of(logits)}, expected {wanted}")
    asked = KEEP in placeholders(gm)
    _require(asked == (ctx.shape.keep < ctx.shape.query), f"input {KEEP!r} is there: {asked}")
    return f"{ctx.shape.keep} of {ctx.shape.query} positions reach the head"


def steered(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """Every site has one value and one set of tables, and nobody reads the value before its edits."""
    _stamped(gm)
    inputs = placeholders(gm)
    values = Counter(node.meta[SITE].name for node in compute_nodes(gm) if SITE in node.meta)
    _require(values == Counter(site.name for site in ctx.sites), f"edits by site: {dict(values)}")
    sources = nodes_of(gm, ctx.sites)
    for site in ctx.sites:
        value = next(n for n in compute_nodes(gm) if n.meta.get(SITE) == site)
        _require(value.meta[ENV] == site.name, f"{site.name}: its value is called otherwise")
        _require(val(value).is_contiguous(), f"{site.name}: its value is not contiguous")
        own = {spec.name: spec for spec in edit_tables(site, ctx.shape, ctx.variant, ctx.dtype, ctx.rank)}
        for name, spec in own.items():
            table = inputs.get(name)
            _require(table is not None and bool(table.users), f"table {name} is not used")
            assert table is not None
            found = (shape_of(table), val(table).dtype)
            _require(found == (spec.shape, spec.dtype), f"table {name} is {found}")
        if ctx.kind == "lm":
            tokens = ctx.shape.keep if site.axis == "kept" else ctx.shape.query
            wanted = (ctx.shape.rows, tokens, *site.feature_shape)
            _require(shape_of(value) == wanted, f"{site.name} is {shape_of(value)}, not {wanted}")
        source = sources[site.name]
        if source is not value:
            chain = ancestors(value, stop=(source,))
            early = [user.name for user in source.users if user not in chain]
            _require(not early, f"{site.name}: {early} read the value before its edits")
    _only_declared_writes(gm, ctx)
    return f"{len(ctx.sites)} sites, variant {ctx.variant}"


def split(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """The original order, one segment per site, declared inputs are the used ones, writes stay inside."""
    calls = segment_calls(gm)
    ends = [call.meta[CUT].name for call in calls if call.meta[CUT] is not None]
    wanted = [site.name for site in ctx.sites] if ctx.cuts in ("sites", "both") else []
    _require(ends == wanted, f"segments end at {ends}, expected {wanted}")
    order = [info.origin for info in before if _counts(info.op, info.target)]
    found: list[int] = []
    for call in calls:
        part = _part(gm, call)
        found += [n.meta[ORIGIN] for n in compute_nodes(part) if _counts(n.op, str(n.target))]
        declared = [n for n in part.graph.nodes if n.op == "placeholder"]
        unused = [n.name for n in declared if not n.users]
        _require(not unused, f"{call.target} declares inputs that it does not use: {unused}")
        _require(
            tuple(n.meta[ENV] for n in declared) == call.meta[INPUTS],
            f"{call.target}: declared inputs differ from its placeholders",
        )
        made = tuple(n.meta[ENV] for n in results(part))
        _require(made == call.meta[OUTPUTS], f"{call.target}: outputs {made} differ from declared")
        site = call.meta[CUT]
        _require(site is None or site.name in made, f"{call.target} does not return its site")
    named = Counter([*placeholders(gm), *(n for call in calls for n in call.meta[OUTPUTS])])
    twice = [name for name, count in named.items() if count > 1]
    _require(not twice, f"values that share a name: {twice}")
    _require(found == order, "the segments' ops are not the graph's ops in their order")
    _require(_writes_before_reads(gm, calls), "an attention reads an arena before it is written")
    return f"{len(calls)} segments in the original order"


def yielded(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """The live sets equal the liveness recomputed backwards, and describe the values they name."""
    calls = segment_calls(gm)
    values = {node.meta[ENV]: node for node in gm.graph.nodes if node.op == "call_function"}
    needed = {node.meta[ENV] for node in output_of(gm).all_input_nodes}
    for call in reversed(calls):
        live = {name for name in needed if name in values}
        if call.meta[CUT] is not None:
            live.add(call.meta[CUT].name)
        stated = {spec.name for spec in call.meta[LIVE]}
        _require(live == stated, f"{call.target}: live {sorted(live)}, stated {sorted(stated)}")
        for spec in call.meta[LIVE]:
            fake = val(values[spec.name])
            same = (spec.shape, spec.dtype) == (tuple(fake.shape), fake.dtype)
            _require(same, f"{spec.name} is {tuple(fake.shape)} {fake.dtype}, stated {spec}")
        needed = (needed - set(call.meta[OUTPUTS])) | set(call.meta[INPUTS])
    largest = max((sum(s.nbytes for s in c.meta[LIVE] if not s.alias_of) for c in calls), default=0)
    return f"at most {largest} bytes live"


def lowered(gm: fx.GraphModule, ctx: PassContext, before: Before) -> str:
    """Each class of segments makes, from its inputs' shapes, the shapes, dtypes and strides promised."""
    values = {node.meta[ENV]: node for node in gm.graph.nodes if node.op == "call_function"}
    checked: set[str] = set()
    for call in segment_calls(gm):
        _require(callable(call.meta.get(RUN)), f"{call.target} has nothing to run")
        if call.meta[CLASS] not in checked:
            checked.add(call.meta[CLASS])
            _check_shapes(_part(gm, call), call, values)
    return f"{len(checked)} distinct segments"


def _check_shapes(part: fx.GraphModule, call: fx.Node, values: Mapping[str, fx.Node]) -> None:
    """Propagate fake tensors through a segment and compare its outputs with the promised ones."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    mode = fake_mode(part)
    for node in part.graph.nodes:
        mapping[node] = copy.node_copy(node, mapping.__getitem__)
        if node.op == "call_function":
            propagate(mapping[node], mode)
    for name, node in zip(call.meta[OUTPUTS], results(part), strict=True):
        made, promised = _form(val(mapping[node])), _form(val(values[name]))
        _require(made == promised, f"{call.target}: {name} is {made}, promised {promised}")


def _form(value: Any) -> tuple[object, ...]:
    return tuple(value.shape), value.dtype, value.stride()


def _stamped(gm: fx.GraphModule) -> None:
    """Every node has an origin of its own and a module path."""
    bare = [n.name for n in compute_nodes(gm) if ORIGIN not in n.meta or MODULE not in n.meta]
    _require(not bare, f"nodes without origin or module: {bare}")
    origins = Counter(node.meta[ORIGIN] for node in compute_nodes(gm))
    _require(max(origins.values(), default=1) == 1, "two nodes share an origin")
    blank = [node.name for node in compute_nodes(gm) if "val" not in node.meta]
    _require(not blank, f"nodes without a fake value: {blank}")


def _writes_arena(node: fx.Node) -> bool:
    names = [written.meta.get(ENV, "") for written in mutated_inputs(node)]
    return str(node.target) == _ARENA_WRITE and all(name.startswith("kv.") for name in names)


def _only_declared_writes(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Only arenas and taps are written, each tap once."""
    taps = Counter[str]()
    for node in compute_nodes(gm):
        if mutated_inputs(node) and not _writes_arena(node):
            taps.update(written.meta.get(ENV, node.name) for written in mutated_inputs(node))
    wanted = [] if ctx.variant == "plain" else [f"{site.name}:tap" for site in ctx.sites]
    _require(taps == Counter(wanted), f"values written in place: {dict(taps)}")


def _counts(op: str, target: str) -> bool:
    """Whether a node takes part in the comparison of orders: ``getitem`` moves with its op."""
    return op == "call_function" and target != str(operator.getitem)


def _part(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    part = gm.get_submodule(str(call.target))
    assert isinstance(part, fx.GraphModule)
    return part


def _writes_before_reads(gm: fx.GraphModule, calls: list[fx.Node]) -> bool:
    """Whether each arena is written before attention reads it."""
    written: set[str] = set()
    for call in calls:
        for node in compute_nodes(_part(gm, call)):
            arenas = {n.meta.get(ENV, "") for n in node.all_input_nodes if "val" in n.meta}
            arenas = {name for name in arenas if name.startswith("kv.")}
            if mutated_inputs(node):
                written |= arenas
            elif not arenas <= written:
                return False
    return True


VERIFIERS: Mapping[str, Verifier] = {
    "captured": captured,
    "annotated": annotated,
    "headed": headed,
    "steered": steered,
    "split": split,
    "yielded": yielded,
    "lowered": lowered,
}
