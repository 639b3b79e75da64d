"""Activations and logit lenses drawn for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from djinn_fx.runtime.wording import numbers

_BLOCKS = " ▁▂▃▄▅▆▇█"

Unembed = Callable[[torch.Tensor], torch.Tensor]


def activation(h: torch.Tensor, tokenizer: Any, unembed: Unembed) -> Table:
    """One position's activation ``[width]``: norm, mean, extremes, histogram, largest neurons, logit lens."""
    flat = h.detach().float().cpu().flatten()
    table = Table.grid(padding=(0, 2))
    top = flat.abs().topk(min(5, flat.numel())).indices.tolist()
    table.add_row("  numbers", numbers(flat))
    table.add_row("  values", histogram(flat))
    table.add_row("  largest", ", ".join(f"{i}: {flat[i]:+.2f}" for i in top))
    table.add_row("  lens", ", ".join(f"{word!r} {p:.0%}" for word, p in top_tokens(h, tokenizer, unembed)))
    return table


def histogram(values: torch.Tensor, bins: int = 24) -> str:
    """A histogram of finite values in one line."""
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return "no finite value"
    counts = torch.histc(finite, bins)
    levels = (counts / counts.max() * (len(_BLOCKS) - 1)).ceil().int().tolist()
    return f"{finite.min():+.1f} {''.join(_BLOCKS[level] for level in levels)} {finite.max():+.1f}"


def top_tokens(h: torch.Tensor, tokenizer: Any, unembed: Unembed, count: int = 4) -> list[tuple[str, float]]:
    """The likeliest next tokens and their probabilities if the model ended at this residual ``[width]``."""
    probabilities = unembed(h).float().softmax(-1)
    best = probabilities.topk(min(count, probabilities.numel()))
    return [(tokenizer.decode([int(token)]), float(p)) for p, token in zip(best.values, best.indices, strict=True)]


def logit_lens(residuals: torch.Tensor, tokenizer: Any, unembed: Unembed) -> Table:
    """The likeliest next tokens at each layer: ``residuals`` is ``[layers, width]``."""
    table = Table("layer", "logit lens: likeliest next tokens", box=None, padding=(0, 2))
    for layer, h in enumerate(residuals):
        words = "   ".join(f"{word!r} {p:.0%}" for word, p in top_tokens(h, tokenizer, unembed))
        table.add_row(f"  {layer}", words)
    return table
