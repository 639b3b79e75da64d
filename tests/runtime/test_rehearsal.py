"""Kernels that are made ready while a model is captured: those that its programs call, and nothing is written."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from djinn_fx.passes.pipeline import build
from djinn_fx.program import AttentionSpec
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.rehearsal import Rehearsal
from djinn_fx.specs import ProgramShape
from tests.passes.tiny import Machine, tiny_model

WIDTHS = (1, 16)


def told(target: Any, args: Any) -> tuple[Any, ...]:
    """What decides which kernel is compiled for a call; a stride along one element says nothing."""
    return str(target), *(_shown(arg) if torch.is_tensor(arg) else arg for arg in args)


def _shown(tensor: torch.Tensor) -> tuple[Any, ...]:
    sizes = [(size, stride if size > 1 else 0) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.dtype, *sizes[1:]


class Listening(TorchDispatchMode):
    """Writes down calls of the operators that reach the arena."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("djinn."):
            self.calls.append(told(func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["gpt2", "llama", "gemma2", "gpt_oss", "deepseek_v3", "phi3"])
def test_what_is_rehearsed_is_what_programs_call(case: str) -> None:
    machine = Machine(tiny_model(case))
    source = machine.source
    arena = KVArena(source.kv, 2, 48, source.dtype, source.device)
    before = [part.clone() for pair in arena.layers for part in pair]
    with Listening() as heard:
        Rehearsal(arena, source.attention, WIDTHS).rehearse()
    called = []
    for width in WIDTHS:
        program = build(source, ProgramShape(1, width, 1), sites=(), variant="plain", rank=1, arenas=arena.layers)
        nodes = [node for segment in program.segments for node in segment.graph.graph.nodes]
        for node in nodes:
            if str(node.target) in {"djinn.kv_write.default", "djinn.attention.default"}:
                vals = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in node.args]
                called.append(told(node.target, vals))
    assert set(heard.calls) == set(called)
    for then, now in zip(before, [part for pair in arena.layers for part in pair], strict=True):
        assert torch.equal(then[:-1, :, :-1], now[:-1, :, :-1])


def test_equal_layers_are_rehearsed_once_and_failure_is_nobodys() -> None:
    source = Machine(tiny_model("llama")).source
    arena = KVArena(source.kv, 2, 48, source.dtype, source.device)
    rehearsal = Rehearsal(arena, source.attention, (1,))
    with Listening() as heard:
        rehearsal.rehearse()
    assert len(source.attention) == 2 and len(heard.calls) == 2
    rehearsal.over()
    odd = Rehearsal(arena, [AttentionSpec(4, (), None, None, 1.0)] * 2, (1,))
    with pytest.raises(ValueError, match="zip"):
        odd.rehearse()
    odd._done = Future()
    odd._done.set_exception(ValueError("no kernel"))
    odd.over()
