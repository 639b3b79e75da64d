"""The integer inputs of a program, written row by row into memory that held something else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from djinn_fx.errors import InternalError
from djinn_fx.program import KEEP, LENGTHS, POSITIONS, ROWS, TOKENS
from djinn_fx.runtime.steps import UNKNOWN, Step
from djinn_fx.runtime.tables import BatchRow, int_count, int_views, step_ints, write_ints
from djinn_fx.specs import ProgramShape

SPARE = 9


def row(arena_row: int, start: int, tokens: Sequence[int], shape: ProgramShape) -> BatchRow:
    """A row of a batch, nothing acting in it."""
    return BatchRow(arena_row, Step(start, tuple(tokens), (False,) * len(tokens), -1, shape, ((-1, {}),)))


def written(batch: Sequence[BatchRow], shape: ProgramShape) -> dict[str, list[object]]:
    """What a program is given, by name; the memory held other numbers before."""
    flat = np.full(int_count(shape), 77, dtype=np.int64)
    write_ints(flat, batch, shape, SPARE)
    assert torch.equal(torch.from_numpy(flat), step_ints(batch, shape, SPARE))
    return {name: view.tolist() for name, view in int_views(torch.from_numpy(flat), shape).items()}


def test_a_chunk_that_keeps_its_last_position() -> None:
    # Catches: a place that is off by a row or a pad, and a pad that is left as it was.
    shape = ProgramShape(1, 5, 1)
    assert written([row(3, 7, [11, 12, 13], shape)], shape) == {
        TOKENS: [[11, 12, 13, 0, 0]],
        POSITIONS: [[7, 8, 9, 0, 0]],
        ROWS: [3],
        LENGTHS: [10],
        KEEP: [[2]],
    }


def test_many_rows_and_dead_ones() -> None:
    # Catches: one row's numbers in another's place; kept indices behind a short row's end; dead rows that are alive.
    shape = ProgramShape(4, 3, 2)
    batch = [row(2, 0, [5, 6, 7], shape), row(0, 40, [8], shape), row(1, 6, [UNKNOWN, 63], shape)]
    assert written(batch, shape) == {
        TOKENS: [[5, 6, 7], [8, 0, 0], [UNKNOWN, 63, 0], [0, 0, 0]],
        POSITIONS: [[0, 1, 2], [40, 0, 0], [6, 7, 0], [0, 0, 0]],
        ROWS: [2, 0, 1, SPARE],
        LENGTHS: [3, 41, 8, 0],
        KEEP: [[1, 2], [0, 0], [0, 1], [0, 0]],
    }


@pytest.mark.parametrize("shape", [ProgramShape(3, 1, 1), ProgramShape(1, 16, 16)])
def test_where_all_positions_are_kept_nothing_says_so(shape: ProgramShape) -> None:
    # Catches: an input that the program does not have.
    found = written([row(0, 4, [9], shape)], shape)
    assert KEEP not in found and found[TOKENS][0] == [9, *[0] * (shape.query - 1)]
    assert written([], shape) == {name: torch.zeros_like(torch.tensor(found[name])).tolist() for name in found} | {
        ROWS: [SPARE] * shape.rows
    }


def test_a_step_that_is_longer_than_its_program_is_no_step() -> None:
    # Catches: numbers that run into the next row's.
    shape = ProgramShape(2, 2, 2)
    with pytest.raises(InternalError, match="a step of 3 tokens"):
        step_ints([row(0, 0, [4, 5, 6], shape)], shape, SPARE)


def test_each_input_begins_at_sixteen_bytes() -> None:
    # Catches: a view that kernels may not read in words of 16 bytes.
    flat = torch.zeros(int_count(ProgramShape(3, 5, 1)), dtype=torch.int64)
    views = int_views(flat, ProgramShape(3, 5, 1)).values()
    assert all(view.storage_offset() % 2 == 0 and view.is_contiguous() for view in views)
    assert len({view.storage_offset() for view in views}) == 5
