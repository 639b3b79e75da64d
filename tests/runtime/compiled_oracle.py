"""An oracle for a model that Inductor compiled: what the engine's own programs compute, from a plain loop.

Where a compiler may fuse, the programs themselves define what a value is to the bit, and so does the order in which
they sum over a direction. So this oracle takes the programs of the compiled model as functions, in the armed variant
whatever the engine chose, and an edit's sum over directions from the program of one step. It has everything else of its
own: KV, steps, positions, all other arithmetic, and what comes behind an edit is computed by putting the value in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import djinn_fx as djinn
from djinn_fx.program import LOGITS, Program, kv_name
from djinn_fx.runtime.segments import run_segments
from djinn_fx.runtime.steering import arm
from djinn_fx.runtime.steps import Step as RuntimeStep
from djinn_fx.runtime.tables import BatchRow, steering_inputs
from djinn_fx.sites import Site
from djinn_fx.specs import Edit, ProgramShape, Variant
from tests.bits import same_bits
from tests.oracle import Oracle, Play, Step

Env = dict[str, Tensor]


class CompiledOracle(Oracle):
    """Plays scripts on the programs of a compiled model."""

    def __init__(self, dj: djinn.Dj, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.engine = dj.engine

    def player(self) -> type[Play]:
        """What plays one script."""
        return CompiledPlay

    def arenas(self) -> list[tuple[Tensor, Tensor]]:
        """Empty KV of the shape that the programs were compiled for."""
        return [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in self.engine.arena.layers]

    def compiled(self, shape: ProgramShape, variant: Variant, sites: tuple[Site, ...]) -> Program:
        """The model's program of a shape, in this variant or a richer one."""
        return self.engine.programs.get(shape, variant, sites)


class CompiledPlay(Play):
    """One script. A decode step runs whole, again for every value that is put in; a prompt chunk goes by segments."""

    oracle: CompiledOracle

    def _run(self, step: Step, last: bool) -> bool:
        self.injected: dict[str, Tensor] = {}
        return self._decode(step, last) if step.shape.query == 1 else self._chunk(step, last)

    def _decode(self, step: Step, last: bool) -> bool:
        env = self._whole(step, "armed")
        for site in self.sites:
            before = env[site.name]
            if not self._pass(step, site, env, last):
                return False
            if not same_bits(env[site.name][0], before[0]):
                self.injected[site.name] = env[site.name][0]
                env = self._whole(step, "armed")
        step.logits = env[LOGITS][0].clone()
        return True

    def _chunk(self, step: Step, last: bool) -> bool:
        program = self.oracle.compiled(step.shape, "armed", self.sites)
        self.env = self._env(step, program)
        for segment in program.segments:
            self.before = dict(self.env)
            run_segments(program, self.env, segment.index, segment.index)
            if segment.site is not None and not self._pass(step, segment.site, self.env, last):
                return False
        count = len(step.tokens) if step.shape.keep == step.shape.query else 1
        step.logits = self.env[LOGITS][0, :count].clone()
        return True

    def _steered(self, step: Step, site: Site, value: Tensor, edit: Edit, chosen: list[bool]) -> Tensor:
        if not any(chosen):
            return value  # nor must the program of the edit run: it would leave its keys and values behind
        if edit.strength == 0 or (edit.ablate is None and edit.feature is None):
            return super()._steered(step, site, value, edit, chosen)
        if step.shape.query == 1:
            made = self._whole(step, "rank", site, edit)
        else:
            program = self.oracle.compiled(step.shape, "rank", self.sites)
            made = {**self.before, **self._env(step, program, site, edit)}
            index = program.segment_of(site.name)
            run_segments(program, made, index, index)
        gate = torch.tensor(chosen, device=value.device).reshape(-1, *[1] * (value.dim() - 1))
        return torch.where(gate, made[site.name][0], value)

    def _whole(self, step: Step, variant: Variant, site: Site | None = None, edit: Edit | None = None) -> Env:
        """Logits and the values of all sites, with what was put in so far and perhaps one edit."""
        program = self.oracle.compiled(step.shape, variant, self.sites)
        env = self._env(step, program, site, edit)
        run_segments(program, env, 0, len(program.segments) - 1)
        return env | {each.name: env[f"{each.name}:tap"].clone() for each in self.sites}

    def _env(self, step: Step, program: Program, site: Site | None = None, edit: Edit | None = None) -> Env:
        """The inputs of a program; an edit acts at every position of its site."""
        source, rank, dtype = self.oracle.source, self.oracle.rank, self.oracle.source.dtype
        edits = {}
        if site is not None and edit is not None:
            everywhere = replace(edit, positions="all")
            edits[site.name] = arm(0, everywhere, site, site.dtype or dtype, source.device, rank)
        tokens, sampled = tuple(step.tokens), tuple(step.sampled)
        shown = RuntimeStep(step.start, tokens, sampled, step.last_prompt, step.shape, ((-1, edits),), self.injected)
        batch = [BatchRow(0, shown)]
        tables = steering_inputs(batch, step.shape, program.variant, self.sites, dtype, source.device, rank)
        kv = {kv_name(i, part): t for i, pair in enumerate(self.arenas) for part, t in zip("kv", pair, strict=True)}
        return kv | self._inputs(step) | tables
