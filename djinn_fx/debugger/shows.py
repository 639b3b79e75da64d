"""What the debugger writes about stops, runs, sites and values: plain text."""

from __future__ import annotations

from typing import Any

import torch

from djinn_fx import render
from djinn_fx.dj import Dj
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.stop import Stop
from djinn_fx.runtime.wording import numbers, word
from djinn_fx.sites import Site


def stopped(stop: Stop, dj: Dj) -> str:
    """Where a run stands, in one line, and its numbers in another."""
    where = f"stopped after {stop.site}, {stop.phase}, position {stop.position}"
    return f"{where}, token {word(dj.engine, int(stop.tokens[-1]))}\n{numbers(stop.value[-1])}"


def neurons(h: torch.Tensor, count: int = 5) -> str:
    """A histogram of one position's activation, and its largest values by index."""
    flat = h.detach().float().cpu().flatten()
    return f"{render.histogram(flat)}\nlargest  " + "  ".join(f"{i}: {v:+.2f}" for i, v in largest(flat, count))


def largest(flat: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """Index and value of the values that are largest in size."""
    top = flat.abs().nan_to_num(float("inf")).topk(min(count, flat.numel())).indices.tolist()
    return [(i, float(flat[i])) for i in top]


def site(place: Site, dj: Dj) -> str:
    """A site: its shape, its other names, and whether runs can stop there."""
    shape = ", ".join(map(str, place.feature_shape))
    dtype = str(place.dtype or dj.engine.dtype).removeprefix("torch.")
    compiled = "compiled in" if place.name in dj.compiled_sites else "not compiled in; `break` compiles it in"
    names = f"\nalso {', '.join(place.aliases)}" if place.aliases else ""
    return f"{place.name}  [tokens, {shape}] {dtype}  {place.module or ''}  {compiled}{names}"


def finished(run: Run) -> str:
    """How a run ended, and its text."""
    text = (run.text or str(run.tokens.tolist())).strip()
    return f"finished: {run.finish_reason}, {run.generated} tokens generated\n{text}"


def value(thing: Any) -> str:
    """A value in at most a few lines; large tensors by shape and summary."""
    if isinstance(thing, tuple) and any(isinstance(part, torch.Tensor) for part in thing):
        return "\n".join(value(part) for part in thing[:8])
    if not isinstance(thing, torch.Tensor):
        return str(thing)
    if thing.numel() == 1:
        return f"{thing.item():.6g}" if thing.dtype.is_floating_point else str(thing.item())
    if thing.numel() <= 16:
        return _listed(thing.tolist())
    kind = f"{tuple(thing.shape)} {str(thing.dtype).removeprefix('torch.')}"
    return f"{kind}  {numbers(thing)}\n{render.histogram(thing.float().flatten())}"


def _listed(thing: Any) -> str:
    """Nested lists of numbers; floats to six digits."""
    if isinstance(thing, list):
        return f"[{', '.join(_listed(part) for part in thing)}]"
    return f"{thing:.6g}" if isinstance(thing, float) else str(thing)
