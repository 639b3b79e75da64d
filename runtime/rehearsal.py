"""Kernels made ready in a thread while a model is captured, which takes Python alone and seconds.

Triton compiles a kernel when it is first launched: that is mostly waiting for other programs, and whoever launched it
would wait too. So attention is called here as a program will call it, for a batch whose only row is dead, and a value
is taken over as a checkpoint does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

import djinn_fx.kernels.ops  # noqa: F401 - registers djinn::attention
from djinn_fx.kernels.backend import uses_triton
from djinn_fx.kernels.taking import Taking
from djinn_fx.program import LENGTHS, POSITIONS, ROWS, AttentionSpec
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.tables import step_inputs
from djinn_fx.specs import ProgramShape


class Rehearsal:
    """Begins at once; who needs a kernel meanwhile waits with :meth:`over`, so that none is made twice.

    Args:
        arena: the arena; nothing is written into rows that sessions may have.
        attention: how each of its layers attends.
        widths: numbers of query tokens.
    """

    def __init__(self, arena: KVArena, attention: Iterable[AttentionSpec], widths: Iterable[int]) -> None:
        self._arena, self._widths = arena, tuple(widths)
        pairs = zip(attention, arena.layers, strict=True)
        # Of layers that ask for the same kernels one will do.
        self._layers = {(spec, k.shape, v.shape): (spec, k, v) for spec, (k, v) in pairs}
        self._done: Future[None] | None = None
        if arena.device.type == "cuda" and uses_triton():
            pool = ThreadPoolExecutor(1, thread_name_prefix="djinn-rehearsal")
            self._done = pool.submit(self.rehearse)
            pool.shutdown(wait=False)

    def over(self) -> None:
        """Wait for its end. What failed is not told: whoever launches that kernel will be."""
        if self._done is not None:
            with suppress(Exception):
                self._done.result()
            self._done = None

    @torch.no_grad()
    def rehearse(self) -> None:
        """Call the kernels of every layer in every width, and what takes values over."""
        device = self._arena.device
        if device.type != "cuda":
            self._calls()
            return
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                self._calls()
            stream.synchronize()

    def _calls(self) -> None:
        self._take()
        for width in self._widths:
            inputs = step_inputs([], ProgramShape(1, width, 1), self._arena.spare_row, self._arena.device)
            where = inputs[ROWS], inputs[POSITIONS], inputs[LENGTHS]
            for spec, keys, values in self._layers.values():
                shapes = (spec.heads, keys.shape[3]), (keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3])
                q, k, v = (
                    _blank(heads, width, dim, layout, keys)
                    for (heads, dim), layout in zip(shapes, spec.layouts, strict=True)
                )
                sinks = None if spec.sinks is None else keys.new_zeros(spec.heads, dtype=spec.sinks)
                torch.ops.djinn.kv_write(keys, values, k, v, *where)
                torch.ops.djinn.attention(q, keys, values, *where, spec.window, spec.softcap, sinks, spec.scale)

    def _take(self) -> None:
        """What the first value that somebody was given and a checkpoint takes along would have to make."""
        if not self._arena.layers:
            return
        value = self._arena.layers[0][0].new_zeros(16)
        Taking()(value, value, torch.empty_like(value), torch.zeros(1, dtype=torch.int32, pin_memory=value.is_cuda))


def _blank(heads: int, width: int, dim: int, layout: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros ``[1, heads, width, dim]`` that lie as such a tensor lies in the model."""
    head, position, element = layout
    if head >= position:  # the heads one after the other
        return like.new_zeros(1, heads, width, dim)
    return like.new_zeros(width * position).as_strided(
        (1, heads, width, dim), (width * position, head, position, element)
    )
