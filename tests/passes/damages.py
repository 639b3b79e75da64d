"""Damages to graphs: for every invariant of every stage at least one that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import fx

from djinn_fx.passes.graph import (
    CUT,
    ENV,
    MODULE,
    NAMES,
    ORIGIN,
    SITE,
    Emitter,
    aten,
    compute_nodes,
    output_of,
    placeholders,
    results,
    val,
)
from djinn_fx.passes.lower import CLASS, RUN
from djinn_fx.passes.marks import MARK
from djinn_fx.passes.split import INPUTS, OUTPUTS
from djinn_fx.passes.yields import LIVE, segment_calls

Damage = Callable[[fx.GraphModule], None]


def first(gm: fx.GraphModule, *targets: object) -> fx.Node:
    return next(node for node in compute_nodes(gm) if node.target in targets or str(node.target) in targets)


def part(gm: fx.GraphModule, index: int) -> fx.GraphModule:
    found = gm.get_submodule(f"segment_{index}")
    assert isinstance(found, fx.GraphModule)
    return found


# --- captured ---------------------------------------------------------------------------------------


def nameless_input(gm: fx.GraphModule) -> None:
    next(iter(placeholders(gm).values())).meta[ENV] = None


def shared_name(gm: fx.GraphModule) -> None:
    one, two, *_ = placeholders(gm).values()
    two.meta[ENV] = one.meta[ENV]


def call_of_a_method(gm: fx.GraphModule) -> None:
    node = first(gm, aten.linear.default)
    with gm.graph.inserting_after(node):
        made = gm.graph.call_method("sin", (node,))
    made.meta = dict(node.meta, **{ORIGIN: 10**6})


def shared_origin(gm: fx.GraphModule) -> None:
    one, two, *_ = compute_nodes(gm)
    two.meta[ORIGIN] = one.meta[ORIGIN]


def no_module(gm: fx.GraphModule) -> None:
    del first(gm, aten.linear.default).meta[MODULE]


def no_fake_value(gm: fx.GraphModule) -> None:
    del first(gm, aten.linear.default).meta["val"]


# --- annotated --------------------------------------------------------------------------------------


def left_mark(gm: fx.GraphModule) -> None:
    node = first(gm, aten.linear.default)
    Emitter(gm, node, "")(MARK, node, "forgotten")


def left_write(gm: fx.GraphModule) -> None:
    node = first(gm, aten.linear.default)
    Emitter(gm, node, "")(aten.mul_.Tensor, node, 2.0)


def write_by_the_wrong_op(gm: fx.GraphModule) -> None:
    node = first(gm, "djinn.kv_write.default")
    arena = node.args[0]
    Emitter(gm, node, "")(aten.mul_.Tensor, arena, 2.0)


def name_on_two_values(gm: fx.GraphModule) -> None:
    one, two, *_ = compute_nodes(gm)
    one.meta[NAMES] = two.meta[NAMES] = ("resid_post.0",)


# --- headed -----------------------------------------------------------------------------------------


def keep_unused(gm: fx.GraphModule) -> None:
    logits = results(gm)[0]
    wide = Emitter(gm, logits, "")(aten.expand.default, logits, [2, 4, 256])
    output_of(gm).args = ((wide,),)


def keep_misnamed(gm: fx.GraphModule) -> None:
    placeholders(gm)["keep"].meta[ENV] = "kept"


# --- steered ----------------------------------------------------------------------------------------


def lost_edit(gm: fx.GraphModule) -> None:
    del next(n for n in compute_nodes(gm) if SITE in n.meta).meta[SITE]


def value_misnamed(gm: fx.GraphModule) -> None:
    next(n for n in compute_nodes(gm) if SITE in n.meta).meta[ENV] = "other"


def table_unused(gm: fx.GraphModule) -> None:
    scale = placeholders(gm)["resid_post.0:scale"]
    scale.replace_all_uses_with(placeholders(gm)["resid_post.0:add"])


def table_of_another_shape(gm: fx.GraphModule) -> None:
    node = placeholders(gm)["resid_post.0:scale"]
    node.meta["val"] = val(placeholders(gm)["resid_post.0:tap"])


def early_reader(gm: fx.GraphModule) -> None:
    value = next(n for n in compute_nodes(gm) if SITE in n.meta)
    source = next(n for n in compute_nodes(gm) if "resid_post.0" in n.meta[NAMES])
    reader = next(n for n in value.users if n.target is not aten.copy_.default)
    reader.replace_input_with(value, source)


def second_tap(gm: fx.GraphModule) -> None:
    node = first(gm, aten.copy_.default)
    Emitter(gm, node, "")(aten.copy_.default, *node.args)


def value_not_contiguous(gm: fx.GraphModule) -> None:
    value = next(n for n in compute_nodes(gm) if SITE in n.meta)
    value.meta["val"] = val(value).transpose(0, 1)


# --- split ------------------------------------------------------------------------------------------


def lost_cut(gm: fx.GraphModule) -> None:
    segment_calls(gm)[0].meta[CUT] = None


def swapped_ops(gm: fx.GraphModule) -> None:
    nodes = [n for n in compute_nodes(part(gm, 1)) if n.op == "call_function"]
    one, two = next((a, b) for a, b in pairwise(nodes) if a not in b.all_input_nodes)
    two.append(one)


def undeclared_input(gm: fx.GraphModule) -> None:
    call = segment_calls(gm)[1]
    call.meta[INPUTS] = call.meta[INPUTS][1:]


def unused_input(gm: fx.GraphModule) -> None:
    graph = part(gm, 1).graph
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder("extra")
    node.meta = {ENV: "extra"}
    call = segment_calls(gm)[1]
    call.meta[INPUTS] = ("extra", *call.meta[INPUTS])


def undeclared_output(gm: fx.GraphModule) -> None:
    call = segment_calls(gm)[0]
    call.meta[OUTPUTS] = call.meta[OUTPUTS][1:]


def read_before_write(gm: fx.GraphModule) -> None:
    graph = part(gm, 0)
    attention, write = first(graph, "djinn.attention.default"), first(graph, "djinn.kv_write.default")
    origins = attention.meta[ORIGIN], write.meta[ORIGIN]
    attention.append(write)
    attention.meta[ORIGIN], write.meta[ORIGIN] = origins[1], origins[0]


# --- yielded ----------------------------------------------------------------------------------------


def forgotten_value(gm: fx.GraphModule) -> None:
    call = segment_calls(gm)[0]
    call.meta[LIVE] = call.meta[LIVE][1:]


def dead_value(gm: fx.GraphModule) -> None:
    one, two, *_ = segment_calls(gm)
    two.meta[LIVE] = (*one.meta[LIVE], *two.meta[LIVE])


def misdescribed_value(gm: fx.GraphModule) -> None:
    call = segment_calls(gm)[0]
    call.meta[LIVE] = tuple(replace(spec, dtype=torch.float16) for spec in call.meta[LIVE])


# --- lowered ----------------------------------------------------------------------------------------


def nothing_to_run(gm: fx.GraphModule) -> None:
    segment_calls(gm)[0].meta[RUN] = None


def other_result(gm: fx.GraphModule) -> None:
    graph = part(gm, 1)
    promised = val(results(graph)[0]).shape
    node = next(n for n in compute_nodes(graph) if val(n) is not None and val(n).shape != promised)
    output = output_of(graph)
    output.args = ((node, *results(graph)[1:]),)
    segment_calls(gm)[1].meta[CLASS] = "another class"


#: Stage, damage and words of the message.
DAMAGES: list[tuple[str, Damage, str]] = [
    ("captured", nameless_input, "no environment name"),
    ("captured", shared_name, "share a name"),
    ("captured", call_of_a_method, "no op calls"),
    ("captured", shared_origin, "share an origin"),
    ("captured", no_module, "without origin or module"),
    ("captured", no_fake_value, "without a fake value"),
    ("annotated", left_mark, "mark is left"),
    ("annotated", left_write, "in-place ops"),
    ("annotated", write_by_the_wrong_op, "in-place ops"),
    ("annotated", name_on_two_values, "several nodes"),
    ("headed", keep_unused, "logits are"),
    ("headed", keep_misnamed, "'keep' is there"),
    ("steered", lost_edit, "edits by site"),
    ("steered", value_misnamed, "called otherwise"),
    ("steered", table_unused, "scale is not used"),
    ("steered", table_of_another_shape, "scale is"),
    ("steered", early_reader, "before its edits"),
    ("steered", second_tap, "written in place"),
    ("steered", value_not_contiguous, "not contiguous"),
    ("split", lost_cut, "segments end at"),
    ("split", swapped_ops, "not the graph's ops"),
    ("split", undeclared_input, "declared inputs"),
    ("split", unused_input, "does not use"),
    ("split", undeclared_output, "outputs"),
    ("split", read_before_write, "before it is written"),
    ("yielded", forgotten_value, "live"),
    ("yielded", dead_value, "live"),
    ("yielded", misdescribed_value, "stated"),
    ("lowered", nothing_to_run, "nothing to run"),
    ("lowered", other_result, "promised"),
]
