"""The compiled models and oracles of the state machine, shared by all its examples."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import djinn_fx as djinn
from djinn_fx.passes.pipeline import CaptureStore
from djinn_fx.runtime.arena import KVArena
from djinn_fx.specs import ProgramShape
from tests.backends import compile_model
from tests.families import EOS, LAYERS, LENGTH, ROWS, family
from tests.oracle import Oracle
from tests.runtime import acts
from tests.runtime.compiled_oracle import CompiledOracle

DEVICE = os.environ.get("DJINN_TEST_DEVICE", "cpu")
RANK = 3
#: What a tight model has beside its two rows: positions on the host, and on the disk.
TIGHT_ROWS, HOST, DISK = 2, 30, 30


@dataclass(frozen=True)
class Setup:
    """One compiled model.

    Attributes:
        model: of :mod:`tests.families`.
        invariant: ``batch_invariant``.
        chunk: ``prefill_chunk``.
        backend: of :mod:`tests.backends`.
        tight: two rows and little host memory, so that sessions go to the host, to the disk and nowhere.
        poison: what nobody owns holds NaN instead of zeros.
    """

    model: str
    invariant: bool
    chunk: int
    backend: str
    tight: bool = False
    poison: bool = False

    @property
    def rows(self) -> int:
        """KV rows."""
        return TIGHT_ROWS if self.tight else ROWS

    @property
    def unowned(self) -> float:
        """What a free row holds."""
        return math.nan if self.poison else 0.0

    @property
    def decode_rows(self) -> int:
        """Rows of the program that a session alone decodes in."""
        return self.rows if self.invariant else 1


def position_bytes(name: str) -> int:
    """Bytes of a position's KV."""
    return 2 * LAYERS * (4 if name == "gpt2" else 2) * 8 * (2 if name.endswith("bf16") else 4)


@cache
def captures_of(name: str) -> CaptureStore:
    """What was exported of a model: the same for all that is compiled of it."""
    return CaptureStore()


@cache
def compiled(setup: Setup, *, spare: bool = False) -> djinn.Dj:
    """The test session's compiled model; ``spare``: another one, with host memory for all, as a new process has it."""
    budgets = {}
    if setup.tight and not spare:
        unit = position_bytes(setup.model)
        budgets = {"pinned_bytes": HOST * unit, "disk_bytes": DISK * unit}
    with mock.patch("djinn_fx.dj.CaptureStore", lambda: captures_of(setup.model)):
        dj = compile_model(
            family(setup.model, DEVICE),
            setup.backend,
            sites=acts.SITES,
            max_sessions=setup.rows,
            max_length=LENGTH,
            prefill_chunk=setup.chunk,
            edit_rank=RANK,
            batch_invariant=setup.invariant,
            verify=False,
            **budgets,
        )
    assert dj.engine.arena.bytes_per_position == position_bytes(setup.model)
    return dj


@cache
def oracle_of(setup: Setup) -> Oracle:
    """The test session's oracle of a compiled model."""
    model, dj = family(setup.model, DEVICE), compiled(setup)
    options: dict[str, Any] = {"length": LENGTH, "chunk": setup.chunk, "rank": RANK, "eos": [EOS]}
    if setup.backend == "inductor":
        return CompiledOracle(dj, model, **options)
    decode = dj.engine.programs.get(ProgramShape(setup.decode_rows, 1, 1), "plain", dj.engine.sites)
    grouped = any(record.name == "projections" for record in decode.records)
    return Oracle(model, **options, grouped=grouped)


def fill(arena: KVArena, row: int, value: float) -> None:
    """Fill one row of an arena."""
    for tensor in arena.env.values():
        tensor[row].fill_(value)


@contextmanager
def poisoned(arena: KVArena) -> Iterator[None]:
    """Inside, whatever a session leaves, and whatever it has not written yet, holds NaN."""
    for row in range(arena.rows + 1):
        fill(arena, row, math.nan)
    with mock.patch.object(arena.packer, "clear", lambda row: fill(arena, row, math.nan)):
        yield
