"""A broken pass is caught by the runner: every invariant has a damage that breaks it."""

from __future__ import annotations

import operator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import fx

from djinn_fx.errors import CaptureError, InternalError
from djinn_fx.passes.annotate import annotate
from djinn_fx.passes.capture import capture_step
from djinn_fx.passes.context import Pass, PassContext, Stage
from djinn_fx.passes.graph import (
    NAMES,
    copy_graph,
)
from djinn_fx.passes.head import head
from djinn_fx.passes.lower import lower
from djinn_fx.passes.runner import run_passes
from djinn_fx.passes.split import split
from djinn_fx.passes.steer import steer
from djinn_fx.passes.verify import VERIFIERS
from djinn_fx.passes.yields import yields
from djinn_fx.specs import ProgramShape
from tests.passes.damages import DAMAGES, Damage
from tests.passes.tiny import Machine

ORDER: list[tuple[str, Pass]] = [
    ("headed", head),
    ("steered", steer),
    ("split", split),
    ("yielded", yields),
    ("lowered", lower),
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
    dump = Path(str(caught.value).split(" holds the graph")[0].split()[-1]) / "before.txt"
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
