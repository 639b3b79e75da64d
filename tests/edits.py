"""Edits by plain torch arithmetic, as a hook would do them: what steering must compute, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from djinn_fx.specs import Edit, Positions


def speaks_of(positions: Positions, at: int, sampled: bool, last_prompt: int) -> bool:
    """Whether a user's ``positions`` speaks of position ``at``."""
    if isinstance(positions, str):
        spoken = {"all": True, "prompt": not sampled, "generated": sampled, "last_prompt": at == last_prompt}
        return spoken[positions]
    if isinstance(positions, int):
        return at == positions
    if isinstance(positions, slice):
        return at in range(positions.start or 0, 1 << 30 if positions.stop is None else positions.stop)
    return any(speaks_of(one, at, sampled, last_prompt) for one in positions)


def steered(h: Tensor, edit: Edit, chosen: Sequence[bool], rank: int) -> Tensor:
    """``h`` ``[positions, *feature_shape]`` with an edit applied at the chosen positions, rounded after each part."""
    if edit.strength == 0:
        return h
    wide, strength = torch.promote_types(h.dtype, torch.float32), edit.strength
    shape = h.shape[1:]

    def row(given: Tensor) -> Tensor:
        given = given.to(h.device, wide)
        return given.reshape(shape) if given.numel() == shape.numel() else given.expand(shape)

    factor = torch.as_tensor(edit.scale, dtype=wide, device=h.device)
    factor = row(factor) if factor.dim() else factor
    out = (h.to(wide) * (factor if strength == 1 else 1 + strength * (factor - 1))).to(h.dtype)
    if edit.add is not None:
        out = (out.to(wide) + row(edit.add) * strength).to(h.dtype)
    if edit.ablate is not None or edit.feature is not None:
        out = _rank_edited(out, edit, rank)
    gate = torch.tensor(list(chosen), device=h.device).reshape(-1, *[1] * len(shape))
    return torch.where(gate, out, h)


def _rank_edited(h: Tensor, edit: Edit, rank: int) -> Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    flat = h.to(wide).flatten(1)
    parts: list[Tensor] = []

    def move(read: Tensor, write: Tensor, bias: float, target: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        reads, writes = (t.to(h.device, wide).reshape(-1, flat.shape[1]) for t in (read, write))
        for one, other in zip(reads, writes, strict=True):
            now, then = target((flat * one).sum(-1) + bias)
            parts.append(((then - now) * edit.strength)[:, None] * other)

    if edit.ablate is not None:
        given = edit.ablate.reshape(-1, flat.shape[1]).double()
        basis = given / given.norm(dim=-1, keepdim=True)
        if len(basis) > 1:
            basis = torch.linalg.qr(basis.T).Q.T
        move(basis, basis, 0.0, lambda now: (now, torch.zeros_like(now)))
    feature = edit.feature
    if feature is not None:

        def target(before: Tensor) -> tuple[Tensor, Tensor]:
            now = before.relu() if feature.act == "relu" else before
            if feature.act == "jumprelu":
                now = torch.where(before > feature.threshold, before, 0.0)
            if feature.set is not None:
                return now, torch.full_like(now, feature.set)
            return now, now.clamp(feature.min, feature.max)

        move(feature.read, feature.write, feature.bias, target)
    # Unused slots of a program's table add zeros.
    change = sum(parts[1:], parts[0]) + (0.0 if len(parts) < rank else -0.0)
    return (flat + change).to(h.dtype).reshape(h.shape)
