"""The invariants of each stage: what must hold on a graph after a pass, whoever wrote the pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from djinn_fx.passes.context import PassContext


def nothing(gm: fx.GraphModule, ctx: PassContext) -> str:
    return "ok"


VERIFIERS: Mapping[str, Callable[[fx.GraphModule, PassContext], str]] = {
    name: nothing for name in ("captured", "annotated", "headed", "steered", "split", "yielded", "lowered")
}
