"""Selecting positions from captured values."""

from __future__ import annotations

import torch

from djinn_fx.errors import InvalidValue
from djinn_fx.runtime.inputs import PromptBatch
from djinn_fx.runtime.kept import Kept
from djinn_fx.specs import Positions


def select_positions(batch: PromptBatch, kept: Kept, positions: Positions | None, taken: set[int]) -> torch.Tensor:
    """Values as one tensor that belongs to the caller: the users' layout, or the chosen positions of each row.

    Args:
        batch: the prompts.
        kept: what a pass over them left.
        positions: as in ``run_with_cache``.
        taken: see :meth:`Kept.whole`.

    Raises:
        InvalidValue: a position outside a prompt, or rows that yield different numbers of positions.
    """
    if positions is None or positions in ("all", "prompt"):
        whole = kept.whole(taken)
        return batch.spread(kept.rows()) if whole is None else whole
    picked = [value[_indices(positions, value.shape[0])] for value in kept.rows()]
    if len({len(row) for row in picked}) > 1:
        raise InvalidValue(
            f"positions={positions!r} selects different numbers of positions from prompts of different lengths; give "
            "ints (negative ones count from each prompt's end), or leave positions= out."
        )
    return torch.stack(picked)


def _indices(positions: Positions, length: int) -> list[int]:
    if positions == "last_prompt":
        return [length - 1]
    if isinstance(positions, slice):
        return list(range(length))[positions]
    wanted = [positions] if isinstance(positions, int) else list(positions)
    for index in wanted:
        if not isinstance(index, int) or not -length <= index < length:
            raise InvalidValue(f"position {index!r} is outside a prompt of {length} tokens.")
    return [index % length for index in wanted if isinstance(index, int)]
