"""Running a program's segments over an environment of named tensors."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from djinn_fx.program import Program

Env = dict[str, torch.Tensor]


def run_segments(program: Program, env: Env, first: int, last: int) -> None:
    """Run segments ``first`` to ``last`` (inclusive) over ``env``, in place.

    Weights are read from the program, so that ``env`` holds activations and inputs only.
    """
    for segment in program.segments[first : last + 1]:
        arguments = [env[n] if n in env else program.weights[n] for n in segment.inputs]
        with nullcontext() if program.feed is None else program.feed.running(segment.index):
            results = segment.run(*arguments)
        env.update(zip(segment.outputs, results, strict=True))
