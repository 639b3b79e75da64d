"""The input tensors of one execution: tokens, positions and the steering tables of every row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from struct import pack_into
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from djinn_fx.errors import InternalError
from djinn_fx.program import KEEP, LENGTHS, POSITIONS, ROWS, TOKENS
from djinn_fx.runtime.positions import as_index
from djinn_fx.runtime.steering import Armed, RankPart
from djinn_fx.runtime.steps import Step
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape, TableSpec, Variant, edit_tables

Tables = dict[str, torch.Tensor]


#: What may be asked of an executed step: its token only, its logits too, or its sites' values as well.
Wants = Literal["token", "logits", "taps"]


@dataclass(frozen=True)
class BatchRow:
    """One batch row of an execution: the arena row, the step to run there and what may be asked of it afterwards."""

    arena_row: int
    step: Step
    wants: Wants = "taps"


def variant_for(batch: Sequence[BatchRow], sites: Sequence[Site]) -> Variant:
    """The cheapest program variant that has everything these rows need."""
    variant: Variant = "plain"
    for row in batch:
        if row.step.injections:
            variant = "armed"
    for row in batch:
        for site in sites:
            armed = acting(row.step, site)
            if armed is not None and armed.rank is not None:
                return "rank"
            if armed is not None:
                variant = "armed"
    return variant


def acting(step: Step, site: Site) -> Armed | None:
    """The edit that acts at ``site`` at one position of ``step`` at least, or None."""
    armed = step.steering_at(site.order).get(site.name)
    if armed is None or armed.neutral or not any(step.matching(armed.edit.positions)):
        return None
    return armed


def int_views(flat: torch.Tensor, shape: ProgramShape) -> Tables:
    """The integer inputs of a program as views of one buffer of :func:`int_count` elements; each begins at 16 bytes."""
    places = _int_layout(shape).items()
    return {name: flat[at : at + math.prod(dims)].view(dims) for name, (at, dims) in places}


def int_count(shape: ProgramShape) -> int:
    """Elements of the buffer that holds a program's integer inputs."""
    return max(at + _padded(dims) for at, dims in _int_layout(shape).values())


@cache
def _int_layout(shape: ProgramShape) -> Mapping[str, tuple[int, tuple[int, ...]]]:
    """Where each integer input begins in the buffer, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {
        TOKENS: (shape.rows, shape.query),
        POSITIONS: (shape.rows, shape.query),
        ROWS: (shape.rows,),
        LENGTHS: (shape.rows,),
    }
    if shape.keep < shape.query:
        shapes[KEEP] = (shape.rows, shape.keep)
    ends = accumulate(map(_padded, shapes.values()), initial=0)
    return MappingProxyType(dict(zip(shapes, zip(ends, shapes.values(), strict=False), strict=True)))


def _padded(dims: tuple[int, ...]) -> int:
    return -(-math.prod(dims) // 2) * 2


def step_ints(batch: Sequence[BatchRow], shape: ProgramShape, spare_row: int) -> torch.Tensor:
    """Tokens, positions, rows, lengths and kept indices of a batch, padded to ``shape``: one host tensor, int64."""
    flat = np.empty(int_count(shape), dtype=np.int64)
    write_ints(flat, batch, shape, spare_row)
    return torch.from_numpy(flat)


def write_ints(flat: npt.NDArray[np.int64], batch: Sequence[BatchRow], shape: ProgramShape, spare_row: int) -> None:
    """:func:`step_ints` into memory that is there: ``[int_count(shape)]``.

    Batch rows beyond ``batch`` are dead: length 0, position 0, the spare arena row.
    """
    flat.fill(0)
    (tokens, _), (positions, _), (rows, _), (lengths, _), *more = _int_layout(shape).values()
    flat[rows : rows + shape.rows] = spare_row
    for index, row in enumerate(batch):
        step, place = row.step, index * shape.query
        start, count = step.start, len(step.tokens)
        if count > shape.query:
            raise InternalError(f"a step of {count} tokens was given to a program of {shape.query}")
        # A fifth of the time in which numpy takes a tuple.
        pack_into(f"{count}q", flat.data, (tokens + place) * flat.itemsize, *step.tokens)
        flat[positions + place : positions + place + count] = np.arange(start, start + count)
        flat[rows + index], flat[lengths + index] = row.arena_row, start + count
        for kept, _ in more:
            first, begin = max(count - shape.keep, 0), kept + index * shape.keep
            last = max(count - 1, 0)
            flat[begin : begin + shape.keep] = np.minimum(np.arange(first, first + shape.keep), last)


def step_inputs(batch: Sequence[BatchRow], shape: ProgramShape, spare_row: int, device: torch.device) -> Tables:
    """What :func:`step_ints` says, on the device, by name."""
    return int_views(step_ints(batch, shape, spare_row).to(device), shape)


def table_specs(
    shape: ProgramShape, variant: Variant, sites: Sequence[Site], dtype: torch.dtype, rank: int
) -> list[TableSpec]:
    """The steering tables of a program, those of every site."""
    return [spec for site in sites for spec in edit_tables(site, shape, variant, dtype, rank)]


def neutral_tables(specs: Sequence[TableSpec], device: torch.device) -> Tables:
    """Steering tables in which nothing acts."""
    return {spec.name: torch.full(spec.shape, spec.neutral, dtype=spec.dtype, device=device) for spec in specs}


def steering_inputs(
    batch: Sequence[BatchRow],
    shape: ProgramShape,
    variant: Variant,
    sites: Sequence[Site],
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
) -> Tables:
    """The steering tables of every site for a batch; what a row does not use stays neutral."""
    tables = neutral_tables(table_specs(shape, variant, sites, dtype, rank), device)
    if tables:
        write_steering(tables, batch, sites)
    return tables


def write_steering(tables: Tables, batch: Sequence[BatchRow], sites: Sequence[Site]) -> set[str]:
    """Write what acts and what is injected in a batch into neutral tables; returns the names of those written."""
    written: set[str] = set()
    for site in sites:
        for index, row in enumerate(batch):
            parts: list[str] = []
            armed = acting(row.step, site)
            if armed is not None:
                parts += _write_edit(tables, site, index, row.step, armed)
            if site.name in row.step.injections:
                value = row.step.injections[site.name]
                tables[f"{site.name}:inject"][index] = True
                tables[f"{site.name}:tap"][index, : value.shape[0]] = value
                parts += ["inject", "tap"]
            written.update(f"{site.name}:{part}" for part in parts)
    return written


def _write_edit(tables: Tables, site: Site, index: int, step: Step, armed: Armed) -> list[str]:
    """Write one row's edit; returns the parts written."""
    matched = step.matching(armed.edit.positions)
    chosen = [i for i, token in enumerate(step.tokens_of(site)) if matched[token]]
    if not chosen:
        return []
    values = {part: value for part in ("scale", "add") if (value := getattr(armed, part)) is not None}
    for part, value in values.items():
        tables[f"{site.name}:{part}"][index, 0] = value
    parts = list(values)
    if parts:
        tables[f"{site.name}:act"][index, as_index(chosen)] = True
        parts.append("act")
    if armed.rank is None:
        return parts
    tables[f"{site.name}:rank_act"][index, as_index(chosen)] = True
    count = armed.rank.read.shape[0]
    tables[f"{site.name}:slot"][index, :count] = True
    for part in RankPart.__dataclass_fields__:
        tables[f"{site.name}:{part}"][index, :count] = getattr(armed.rank, part)
    return [*parts, "rank_act", "slot", *RankPart.__dataclass_fields__]


def site_row(site: Site, env: Mapping[str, torch.Tensor], index: int, step: Step) -> torch.Tensor:
    """The value of ``site`` for one batch row, pads cut off: ``[tokens, *feature_shape]``, a view."""
    return env[site.name][index, : len(step.tokens_of(site))]
