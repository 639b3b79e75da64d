"""A decode program made ready to run again and again: on CUDA as one graph, elsewhere as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from djinn_fx.kernels.advance import advance
from djinn_fx.program import LENGTHS, LOGITS, POSITIONS, TOKENS, Feed, Program
from djinn_fx.runtime.segments import Env, run_segments

#: Runs before a graph is captured: kernels are compiled and tuned in the first, and libraries make their workspaces.
WARMUP = 2

#: The stream programs are captured on; None on the CPU.
Stream = torch.cuda.Stream | None


@dataclass(frozen=True, eq=False)
class Replayed:
    """A program over static buffers.

    Attributes:
        program: the program.
        run: runs a whole step on the current stream, without waiting.
        logits: the logits ``[rows, 1, vocab]`` of the last run; the next one overwrites them.
    """

    program: Program
    run: Callable[[], None]
    logits: Callable[[], torch.Tensor]


def capture(program: Program, inputs: Env, slot: torch.Tensor, ring: torch.Tensor, stream: Stream) -> Replayed:
    """Make a program ready to run over ``inputs``, which must stay where they are.

    The lanes must be dead meanwhile, so that warming up writes nowhere.

    Args:
        program: the program.
        inputs: its inputs by environment name.
        slot: as :func:`djinn_fx.kernels.advance.advance` takes it.
        ring: likewise.
        stream: where to warm up and capture on CUDA; one for all programs, since libraries keep memory per stream.
    """
    made: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def step() -> None:
        env = dict(inputs)
        run_segments(program, env, 0, len(program.segments) - 1)
        made[LOGITS] = env[LOGITS]
        advance(env[LOGITS][:, 0], env[TOKENS][:, 0], env[POSITIONS][:, 0], env[LENGTHS], slot, ring)

    def logits() -> torch.Tensor:
        return made[LOGITS]

    return Replayed(program, step if stream is None else _captured(step, stream, program.feed), logits)


def _captured(step: Callable[[], None], stream: torch.cuda.Stream, feed: Feed | None) -> Callable[[], None]:
    """Warm up on a stream of its own and capture the step as a CUDA graph; returns its replay."""
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as long as they leave this stream alone.
        with (
            nullcontext() if feed is None else feed.capturing(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
            if feed is not None:
                feed.join()
    if feed is None:
        return graph.replay

    def replay() -> None:
        with feed.replaying():
            graph.replay()

    return replay
