"""A broken pass is caught by the runner: every invariant has a damage that breaks it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import fx

from djinn_fx.errors import CaptureError, InternalError
from djinn_fx.passes.annotate import annotate
from djinn_fx.passes.capture import capture_step
from djinn_fx.passes.context import PassContext
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
    copy_graph,
    output_of,
    placeholders,
    results,
    val,
)
from djinn_fx.passes.head import head
from djinn_fx.passes.lower import CLASS, RUN, lower
from djinn_fx.passes.marks import MARK
from djinn_fx.passes.runner import Pass, Stage, run_passes
from djinn_fx.passes.split import INPUTS, OUTPUTS, split
from djinn_fx.passes.steer import steer
from djinn_fx.passes.verify import VERIFIERS
from djinn_fx.passes.yields import LIVE, segment_calls, yields
from djinn_fx.specs import ProgramShape
from tests.passes.tiny import Machine

Damage = Callable[[fx.GraphModule], None]
ORDER: list[tuple[str, Pass]] = [
    ("headed", head),
    ("steered", steer),
    ("split", split),
    ("yielded", yields),
    ("lowered", lower),
]


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


@pytest.fixture(scope="module")
def context(llama: Machine) -> PassContext:
    return PassContext(
        kind="lm",
        shape=ProgramShape(2, 4, 1),
        dtype=torch.float32,
        sites=llama.table.select("resid_post"),
        variant="armed",
    )


def stages_to(stage: str, llama: Machine, damage: Pass) -> tuple[fx.GraphModule, list[Stage]]:
    """A graph and the passes up to ``stage``, the last of which is damaged."""
    capture = partial(capture_step, source=llama.source, arenas=llama.arenas)
    empty = fx.GraphModule(torch.nn.Module(), fx.Graph())
    empty.graph.output(())
    if stage == "captured":
        return empty, [Stage("capture", "captured", lambda gm, ctx: damage(capture(gm, ctx), ctx))]
    captured = llama.store.captured
    llama.build((2, 4, 1))
    key = next(key for key in captured if isinstance(key, tuple) and key[:2] == (2, 4))
    gm = copy_graph(captured[key].graph)
    if stage == "annotated":
        return gm, [Stage("annotate", "annotated", damage)]
    names = [name for name, _ in ORDER]
    chosen = ORDER[: names.index(stage) + 1]
    stages = [Stage(name, name, run) for name, run in chosen[:-1]]
    last = chosen[-1][1]
    return gm, [*stages, Stage(stage, stage, lambda gm, ctx: damage(last(gm, ctx), ctx))]


@pytest.mark.parametrize(("stage", "damage", "words"), DAMAGES, ids=lambda part: getattr(part, "__name__", ""))
def test_a_damaged_graph_is_caught(
    stage: str, damage: Damage, words: str, llama: Machine, context: PassContext
) -> None:
    def damaged(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
        damage(gm)
        return gm

    gm, stages = stages_to(stage, llama, damaged)
    with pytest.raises(InternalError, match=words) as caught:
        run_passes(gm, stages, context)
    dump = Path(str(caught.value).split("is in ")[1].split("; please")[0])
    assert dump.is_file()
    if stage != "captured":
        assert "aten" in dump.read_text(encoding="utf-8") or "segment_0" in dump.read_text(encoding="utf-8")
    dump.unlink()


@pytest.mark.parametrize("stage", ["captured", *[name for name, _ in ORDER]])
def test_the_sound_passes_get_a_verdict(stage: str, llama: Machine, context: PassContext) -> None:
    """The damages above are what is caught: without them the same passes run through."""
    gm, stages = stages_to(stage, llama, lambda gm, ctx: gm)
    _, records = run_passes(gm, stages, context)
    assert all(record.verdict for record in records)


def test_every_stage_is_damaged_somewhere() -> None:
    assert {stage for stage, _, _ in DAMAGES} == set(VERIFIERS)


def test_a_pass_that_fails_is_our_bug(llama: Machine, context: PassContext) -> None:
    def failing(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
        raise KeyError("lost")

    gm, _ = stages_to("annotated", llama, failing)
    with pytest.raises(InternalError, match=r"'failing' broke stage 'annotated': 'lost'"):
        run_passes(gm, [Stage("failing", "annotated", failing)], context)


def test_a_users_mistake_stays_the_users(llama: Machine, context: PassContext) -> None:
    def refusing(gm: fx.GraphModule, ctx: PassContext) -> fx.GraphModule:
        raise CaptureError("no")

    gm, _ = stages_to("annotated", llama, refusing)
    with pytest.raises(CaptureError, match="no"):
        run_passes(gm, [Stage("refusing", "annotated", refusing)], context)


def test_annotate_twice_changes_nothing(llama: Machine, context: PassContext) -> None:
    gm, _ = stages_to("annotated", llama, lambda gm, ctx: gm)
    before = [(node.target, node.meta.get(NAMES)) for node in gm.graph.nodes if node.target is not operator.getitem]
    again = annotate(gm, context)
    assert [(n.target, n.meta.get(NAMES)) for n in again.graph.nodes if n.target is not operator.getitem] == before
