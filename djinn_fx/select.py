"""Selecting positions from captured values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from djinn_fx.errors import InvalidValue
from djinn_fx.runtime.inputs import PromptBatch
from djinn_fx.specs import Positions


def select_positions(batch: PromptBatch, values: Sequence[torch.Tensor], positions: Positions | None) -> torch.Tensor:
    """Rows ``[tokens, ...]`` as one tensor: the users' layout, or the chosen positions of each row.

    Raises:
        InvalidValue: a position outside a prompt, or rows that yield different numbers of positions.
    """
    if positions is None or positions in ("all", "prompt"):
        return batch.spread(values)
    picked = [value[_indices(positions, value.shape[0])] for value in values]
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
