"""Whether the variants of a program agree bit for bit, measured when a variant is first made.

A session's steps run in the cheapest variant that has what is armed, so a step may run in another variant when it runs
again, and a prompt chunk may go on in a richer one. That is right only if what both have gives the same bits in both.
Compilers promise nothing of the kind; so each new variant is compared with those there are, on a probe in the spare
row of the arena, which no session reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from djinn_fx.program import LOGITS, Program
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.segments import Env, run_segments
from djinn_fx.runtime.steering import Armed, arm
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow, steering_inputs, step_inputs
from djinn_fx.sites import Site
from djinn_fx.specs import Edit, ProgramShape, Variant

#: From the cheapest to the richest.
VARIANTS: tuple[Variant, ...] = ("plain", "armed", "rank")

#: An edit that changes every bit pattern it meets, but not the scale of things.
FACTOR = 0.9


@dataclass(frozen=True)
class Agreement:
    """One comparison of two variants of a shape.

    Attributes:
        shape: the program's shape.
        variants: which two.
        exact: whether logits and sites' values were equal bit for bit.
    """

    shape: ProgramShape
    variants: tuple[Variant, Variant]
    exact: bool


@dataclass
class Agreements:
    """What was found of the variants of one model's programs.

    Attributes:
        arena: the KV of all sessions; only the spare row is touched.
        dtype: the model's dtype.
        device: the model's device.
        rank: directions an edit may have.
        vocab: tokens are below this.
        found: every comparison made.
    """

    arena: KVArena
    dtype: torch.dtype
    device: torch.device
    rank: int
    vocab: int
    found: list[Agreement] = field(default_factory=list)
    _seen: dict[tuple[ProgramShape, tuple[Site, ...]], dict[Variant, Program]] = field(default_factory=dict, repr=False)

    def least(self, shape: ProgramShape, variant: Variant) -> Variant:
        """The variant to use where ``variant`` would do: a richer one if they were found to disagree."""
        for known in self.found:
            if known.shape == shape and not known.exact and known.variants[0] == variant:
                return self.least(shape, known.variants[1])
        return variant

    @torch.no_grad()
    def admit(self, program: Program) -> None:
        """Compare a new program with the other variants of its shape and sites."""
        others = self._seen.setdefault((program.shape, program.sites), {})
        if program.variant in others:
            return
        for other in others.values():
            poor, rich = sorted((program, other), key=lambda each: VARIANTS.index(each.variant))
            exact = self._equal(poor, rich, {})
            if exact and poor.variant != "plain":
                exact = self._equal(poor, rich, self._edits(program.sites))
            self.found.append(Agreement(program.shape, (poor.variant, rich.variant), exact))
        others[program.variant] = program

    def pending(self) -> tuple[str, ...]:
        """The comparisons that wait until a variant is needed and made, in words."""
        missing = []
        for (shape, _), made in self._seen.items():
            missing += [f"{describe(shape)}: {variant}" for variant in VARIANTS if variant not in made]
        return tuple(dict.fromkeys(missing))

    def _edits(self, sites: Sequence[Site]) -> dict[str, Armed]:
        edits = {}
        for site in sites:
            edit = Edit(site.name, scale=FACTOR)
            edits[site.name] = arm(0, edit, site, site.dtype or self.dtype, self.device, self.rank)
        return edits

    def _equal(self, poor: Program, rich: Program, edits: dict[str, Armed]) -> bool:
        first, second = self._probe(poor, edits), self._probe(rich, edits)
        names = [LOGITS, *(site.name for site in poor.sites if site.name in first and site.name in second)]
        return all(same_bits(first[name], second[name]) for name in names)

    def _probe(self, program: Program, edits: dict[str, Armed]) -> Env:
        """Run a program on the first positions of the spare row."""
        shape = program.shape
        count = min(shape.query, self.arena.positions)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab, (shape.rows, count), generator=generator).tolist()
        steering = ((-1, edits),)
        batch = [
            BatchRow(
                self.arena.spare_row,
                Step(row if count == 1 else 0, tuple(tokens[row]), (False,) * count, -1, shape, steering),
            )
            for row in range(min(shape.rows, self.arena.positions))
        ]
        env = step_inputs(batch, shape, self.arena.spare_row, self.device)
        tables = steering_inputs(batch, shape, program.variant, program.sites, self.dtype, self.device, self.rank)
        env |= tables | self.arena.env
        run_segments(program, env, 0, len(program.segments) - 1)
        env |= {site.name: tables[f"{site.name}:tap"] for site in program.sites if f"{site.name}:tap" in tables}
        return env


def describe(shape: ProgramShape) -> str:
    """A shape in words."""
    if shape.query == 1:
        return f"decode of {shape.rows} row{'s' * (shape.rows > 1)}"
    return f"prompt chunk of {shape.query}" + (" with all logits" if shape.keep > 1 else "")
