"""Execution of programs: a batch of decode steps whole, or one prompt chunk segment by segment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from djinn_fx.errors import InternalError
from djinn_fx.program import LOGITS, Program
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.modes import without_grad
from djinn_fx.runtime.programs import ProgramCache
from djinn_fx.runtime.segments import run_segments
from djinn_fx.runtime.stages import Chunk, Stage, Stages
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import (
    BatchRow,
    Tables,
    site_row,
    steering_inputs,
    step_inputs,
    step_ints,
    table_specs,
    variant_for,
)
from djinn_fx.sites import Site
from djinn_fx.specs import TableSpec

if TYPE_CHECKING:
    from djinn_fx.runtime.launch import Launch
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

    def own(self, sites: Sequence[Site], part: float) -> Mapping[str, torch.Tensor]:
        """Values of ``sites``, which are ``part`` of all, to be handed out: nobody else writes or reads them."""


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

    def own(self, sites: Sequence[Site], part: float) -> Mapping[str, torch.Tensor]:
        """Copies of the values of ``sites``."""
        return {site.name: self.value(site).clone() for site in sites}

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the kept positions, ``[kept, vocab]``."""
        shape = self.step.shape
        count = len(self.step.tokens) if shape.keep == shape.query else 1
        return self.env[LOGITS][self.row, :count]


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
        stages: run prompt chunks over static buffers; None: each chunk has its own.
    """

    programs: ProgramCache
    arena: KVArena
    sites: tuple[Site, ...]
    dtype: torch.dtype
    device: torch.device
    rank: int
    loop: DecodeLoop | None = None
    stages: Stages | None = None

    @without_grad
    def decode(self, batch: Sequence[BatchRow], launch: Launch | None = None) -> Sequence[RowValues | None]:
        """Run one decode step of every row, all in the shape of the first row's step.

        None for a row that a decode loop runs later; see :meth:`djinn_fx.runtime.loop.DecodeLoop.decode`, also for
        ``launch``.
        """
        if self.loop is not None:
            return self.loop.decode(batch, launch)
        shape = batch[0].step.shape
        if any(row.step.shape != shape for row in batch) or len(batch) > shape.rows:
            raise InternalError("a decode batch mixes program shapes")
        program = self._program(batch)
        env = self._inputs(batch, program) | self.arena.env
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

    @without_grad
    def begin(self, row: BatchRow, wanted: Iterable[str] | None = None) -> Chunk:
        """Begin a prompt chunk: nothing runs yet.

        Args:
            row: what it computes.
            wanted: sites whose values will be asked for after later ones were reached; None: any.
        """
        if self.loop is not None:
            self.loop.drop(row.arena_row)  # a decode step there was computed from what the chunk overwrites
        program = self._program([row])
        kept = None if wanted is None else frozenset(wanted)
        if self.stages is None:
            return Chunk(program, self._inputs([row], program) | self.arena.env, row, wanted=kept)
        chunk = Chunk(program, {}, row, wanted=kept)
        self._seat(chunk)
        return chunk

    @without_grad
    def refresh(self, chunk: Chunk, row: BatchRow) -> None:
        """Give a chunk in flight the inputs of its row as they are now (steering, arena row).

        A step that needs more than the chunk's variant has goes on in a richer program of the same
        shape, whose values carry the same names and the same bits.
        """
        program, chunk.row = self._program([row], chunk.program), row
        if program is not chunk.program:
            chunk.leave()
            chunk.next_segment = min(chunk.next_segment, len(program.segments))
            chunk.program = program
        if chunk.stage is not None:
            self._refill(chunk)
        elif self.stages is None:
            chunk.put(self._inputs([row], program))

    @without_grad
    def advance(self, chunk: Chunk, until: str | None) -> None:
        """Run a chunk's segments up to and including the one that ends at site ``until``."""
        last = len(chunk.program.segments) - 1
        if until is not None:
            last = chunk.program.segment_of(until)
        if self.stages is None or chunk.next_segment > last:
            run_segments(chunk.program, chunk.env, chunk.next_segment, last)
        else:
            self._seat(chunk).run(chunk.next_segment, last)
        chunk.moved_on(last + 1)

    def _program(self, batch: Sequence[BatchRow], current: Program | None = None) -> Program:
        """The program that runs a batch: the one at hand, if it is rich enough."""
        sites = self.sites if current is None else current.sites
        variant = variant_for(batch, sites)
        if current is not None and variant == "plain":
            variant = current.variant
        return self.programs.get(batch[0].step.shape, variant, sites)

    def _inputs(self, batch: Sequence[BatchRow], program: Program) -> Tables:
        """What a program is given beside weights and arenas."""
        shape = program.shape
        tables = steering_inputs(batch, shape, program.variant, program.sites, self.dtype, self.device, self.rank)
        return step_inputs(batch, shape, self.arena.spare_row, self.device) | tables

    def _seat(self, chunk: Chunk) -> Stage:
        """Bring a chunk onto its stage, unless it is there."""
        if chunk.stage is None:
            self._stage(chunk.program).seat(chunk)
            self._refill(chunk)
        assert chunk.stage is not None
        return chunk.stage

    def _refill(self, chunk: Chunk) -> None:
        """Give a chunk on a stage all its inputs anew."""
        assert chunk.stage is not None
        chunk.stage.refill(chunk.row, self.arena.spare_row)

    def _stage(self, program: Program) -> Stage:
        assert self.stages is not None
        return self.stages.of(program, lambda: self._stage_inputs(program))

    def _stage_inputs(self, program: Program) -> tuple[list[TableSpec], torch.Tensor]:
        """A program's steering tables, and the integer inputs of dead rows."""
        specs = table_specs(program.shape, program.variant, program.sites, self.dtype, self.rank)
        return specs, step_ints([], program.shape, self.arena.spare_row)
