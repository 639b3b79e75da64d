"""What the debugger writes about stops, runs and lenses: plain text."""

from __future__ import annotations

from typing import Any

import torch

from djinn_fx import render
from djinn_fx.dj import Dj
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.stop import Stop


def token_text(dj: Dj, token: int) -> str:
    """One token as text, or its number where there is no tokenizer."""
    return repr(dj.engine.decode_text([token])) if dj.engine.tokenizer is not None else str(token)


def stopped(stop: Stop, dj: Dj) -> str:
    """Where a run stands, in one line, and its numbers in another."""
    where = f"stopped after {stop.site}, {stop.phase}, position {stop.position}"
    return f"{where}, token {token_text(dj, int(stop.tokens[-1]))}\n{numbers(stop.value[-1])}"


def numbers(h: torch.Tensor) -> str:
    """Norm, mean, extremes and non-finite values of one position's activation."""
    flat = h.detach().float().cpu().flatten()
    bad = int((~torch.isfinite(flat)).sum())
    flag = f"  NON-FINITE {bad}" if bad else ""
    return f"norm {flat.norm():.2f}  mean {flat.mean():+.3f}  min {flat.min():+.2f}  max {flat.max():+.2f}{flag}"


def finished(run: Run) -> str:
    """How a run ended, and its text."""
    text = (run.text or str(run.tokens.tolist())).strip()
    return f"finished: {run.finish_reason}, {run.generated} tokens generated\n{text}"


def value(thing: Any) -> str:
    """A value in at most a few lines; large tensors by shape and summary."""
    if not isinstance(thing, torch.Tensor):
        return str(thing)
    if thing.numel() == 1:
        return f"{thing.item():.6g}" if thing.dtype.is_floating_point else str(thing.item())
    if thing.numel() <= 16:
        return str(thing.tolist())
    kind = f"{tuple(thing.shape)} {str(thing.dtype).removeprefix('torch.')}"
    return f"{kind}  {numbers(thing)}\n{render.histogram(thing.float().flatten())}"


def lens(dj: Dj, stop: Stop, count: int = 3) -> str:
    """The logit lens at the stop, and at every layer for the same tokens run plainly."""
    tokenizer: Any = dj.engine.tokenizer

    def words(h: torch.Tensor) -> str:
        if tokenizer is None:
            best = dj.unembed(h).float().softmax(-1).topk(count)
            return "  ".join(f"{int(i)} {float(p):.0%}" for p, i in zip(best.values, best.indices, strict=True))
        return "  ".join(f"{word!r} {p:.0%}" for word, p in render.top_tokens(h, tokenizer, dj.unembed, count))

    cache = dj.run_with_cache(stop.tokens, "resid_post", positions=-1, logits=False)[1]
    lines = [f"{name:>14}  {words(value.flatten(0, -2)[-1])}" for name, value in cache.items()]
    here = stop.value[-1]
    if stop.place.role in ("resid_pre", "resid_mid", "resid_post"):
        lines.append(f"{'here':>14}  {words(here)}")
    return "\n".join(lines)
