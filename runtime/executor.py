"""Execution of programs: a batch of decode steps whole, or one prompt chunk segment by segment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from djinn_fx.errors import InternalError
from djinn_fx.program import LOGITS, Program
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.programs import ProgramCache
from djinn_fx.runtime.segments import Env, run_segments
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import (
    BatchRow,
    site_row,
    steering_inputs,
    step_inputs,
    variant_for,
)
from djinn_fx.sites import Site

if TYPE_CHECKING:
    from djinn_fx.runtime.loop import DecodeLoop


class RowValues(Protocol):
    """What an executed decode step left behind for one row."""

    @property
    def step(self) -> Step:
        """The step."""

    @property
    def token(self) -> int | None:
        """The most likely next token, if the step found it already; waits for the device."""

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the kept positions, ``[kept, vocab]``, a view."""

    def has(self, site: Site) -> bool:
        """Whether the value of ``site`` can be read."""

    def value(self, site: Site) -> torch.Tensor:
        """Value of ``site``, ``[tokens, *feature_shape]``; a view, copy before handing it out."""


@dataclass
class StepValues:
    """What an executed step left behind for one row, as views of its batch's environment."""

    step: Step
    row: int
    env: Mapping[str, torch.Tensor]

    @property
    def token(self) -> int | None:
        """Not known: whoever needs it draws it from the logits."""
        return None

    def has(self, site: Site) -> bool:
        """Whether the value of ``site`` was kept."""
        return site.name in self.env

    def value(self, site: Site) -> torch.Tensor:
        """Value of ``site``, ``[tokens, *feature_shape]``; a view, copy before handing it out."""
        return site_row(site, self.env, self.row, self.step)

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the kept positions, ``[kept, vocab]``."""
        shape = self.step.shape
        count = len(self.step.tokens) if shape.keep == shape.query else 1
        return self.env[LOGITS][self.row, :count]


@dataclass
class Chunk:
    """A prompt chunk in flight: its program, its environment and the next segment to run."""

    program: Program
    env: Env
    next_segment: int = 0

    @property
    def complete(self) -> bool:
        """Whether every segment has run."""
        return self.next_segment == len(self.program.segments)


@dataclass
class Executor:
    """Runs steps on one model's arena.

    Attributes:
        programs: where programs come from.
        arena: the KV of all sessions.
        sites: the compiled sites, in execution order.
        dtype: the model's dtype.
        device: the model's device.
        rank: directions an edit may have.
        loop: runs decode steps over static buffers; None: each step is run by itself.
    """

    programs: ProgramCache
    arena: KVArena
    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device
    rank: int
    loop: DecodeLoop | None = None

    @torch.no_grad()
    def decode(self, batch: Sequence[BatchRow]) -> Sequence[RowValues | None]:
        """Run one decode step of every row, all in the shape of the first row's step.

        None for a row that a decode loop runs later; see :meth:`djinn_fx.runtime.loop.DecodeLoop.decode`.
        """
        if self.loop is not None:
            return self.loop.decode(batch)
        shape = batch[0].step.shape
        if any(row.step.shape != shape for row in batch) or len(batch) > shape.rows:
            raise InternalError("a decode batch mixes program shapes")
        env, program = self._prepare(batch)
        run_segments(program, env, 0, len(program.segments) - 1)
        kept = {site.name: env[site.name] for site in self.sites} | {LOGITS: env[LOGITS]}
        return [StepValues(row.step, index, kept) for index, row in enumerate(batch)]

    def decode_one(self, row: BatchRow) -> RowValues:
        """Run one decode step of one row, now."""
        if self.loop is not None:
            self.loop.drop()
        (values,) = self.decode([row])
        if values is None:
            raise InternalError("a step that was asked for now was put off")
        return values

    @torch.no_grad()
    def begin(self, row: BatchRow) -> Chunk:
        """Begin a prompt chunk: nothing runs yet."""
        env, program = self._prepare([row])
        return Chunk(program, env)

    @torch.no_grad()
    def refresh(self, chunk: Chunk, row: BatchRow) -> None:
        """Give a chunk in flight the inputs of its row as they are now (steering, arena row).

        A step that needs more than the chunk's variant has goes on in a richer program of the same
        shape, whose values carry the same names and the same bits.
        """
        env, program = self._prepare([row], chunk.program)
        if program is not chunk.program:
            chunk.next_segment = min(chunk.next_segment, len(program.segments))
            chunk.program = program
        chunk.env.update(env)

    @torch.no_grad()
    def advance(self, chunk: Chunk, until: str | None) -> None:
        """Run a chunk's segments up to and including the one that ends at site ``until``."""
        last = len(chunk.program.segments) - 1
        if until is not None:
            last = chunk.program.segment_of(until)
        run_segments(chunk.program, chunk.env, chunk.next_segment, last)
        chunk.next_segment = max(chunk.next_segment, last + 1)

    def _prepare(self, batch: Sequence[BatchRow], current: Program | None = None) -> tuple[Env, Program]:
        sites = self.sites if current is None else current.sites
        variant = variant_for(batch, sites)
        if current is not None and variant == "plain":
            variant = current.variant
        shape = batch[0].step.shape
        program = self.programs.get(shape, variant, sites)
        env = step_inputs(batch, shape, self.arena.spare_row, self.device)
        env |= steering_inputs(batch, shape, program.variant, sites, self.dtype, self.device, self.rank)
        return env | self.arena.env, program
