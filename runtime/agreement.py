"""Whether compiled programs agree, with one another and with their graphs, measured when each is first made.

A session's steps run in the cheapest variant that has what is armed, so a step may run in another variant when it runs
again, and a prompt chunk may go on in a richer one. That is right only if what both have gives the same bits in both.
Compilers promise nothing of the kind; so each new program is compared with the variants there are, with its rows in
another order, and with itself stopped and resumed, on a probe in the spare row of the arena, which no session reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from djinn_fx.errors import CaptureMismatch
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

#: Rows that are compared at a time.
PART = 64

#: An edit that changes every bit pattern it meets, but not the scale of things.
FACTOR = 0.9


#: How far a compiled program may be from its own graph run op by op, in units in the last place of the largest logit.
COMPILER_ULPS = 16


@dataclass(frozen=True)
class Finding:
    """One comparison of a program.

    Attributes:
        shape: the program's shape.
        name: what was compared.
        exact: whether it held: bit for bit, or within ``tolerance`` where that is not 0.
        worst: largest difference.
        tolerance: the yardstick; 0 for bitwise comparisons.
        variants: the poorer and the richer one, where two variants were compared.
    """

    shape: ProgramShape
    name: str
    exact: bool
    worst: float = 0.0
    tolerance: float = 0.0
    variants: tuple[Variant, Variant] | None = None


@dataclass
class Agreements:
    """What was found of one model's compiled programs.

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
    found: list[Finding] = field(default_factory=list)
    _seen: dict[tuple[ProgramShape, tuple[Site, ...]], dict[Variant, Program]] = field(default_factory=dict, repr=False)

    def least(self, shape: ProgramShape, variant: Variant) -> Variant:
        """The variant to use where ``variant`` would do: a richer one if they were found to disagree."""
        for known in self.found:
            if known.variants is not None and known.shape == shape and not known.exact and known.variants[0] == variant:
                return self.least(shape, known.variants[1])
        return variant

    def pending(self) -> tuple[str, ...]:
        """The variants that are compared once they are needed and made, in words."""
        missing = []
        for (shape, _), made in self._seen.items():
            missing += [f"{describe(shape)} ({variant})" for variant in VARIANTS if variant not in made]
        return tuple(dict.fromkeys(missing))

    @torch.no_grad()
    def admit(self, program: Program) -> None:
        """Compare a new program with its own graph, with the other variants of its shape, and with itself.

        Raises:
            CaptureMismatch: the compiler made something else of the graph.
        """
        others = self._seen.setdefault((program.shape, program.sites), {})
        if program.variant in others:
            return
        first = self._probe(program, {})
        if not others:
            self._compare_graph(program, first)
            if program.shape.rows > 1:
                self._compare_permuted(program, first)
        for other in others.values():
            self._compare_variants(*sorted((program, other), key=lambda each: VARIANTS.index(each.variant)))
        if program.variant == "armed" and program.shape.query == 1:
            self._compare_resumed(program, first)
        others[program.variant] = program
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the probes of a large model leave much that no step will ask for again

    # -- comparisons ---------------------------------------------------------------------------

    def _compare_graph(self, program: Program, first: Env) -> None:
        plain = self._probe(as_graph(program), {})
        worst = difference(first[LOGITS], plain[LOGITS])
        finite = plain[LOGITS][torch.isfinite(plain[LOGITS])]
        largest = float(finite.abs().max()) if finite.numel() else 1.0
        tolerance = COMPILER_ULPS * torch.finfo(self.dtype).eps * max(largest, 1e-30)
        name = "compiled = op by op"
        self.found.append(Finding(program.shape, name, worst <= tolerance, worst, tolerance))
        if worst > tolerance:
            raise CaptureMismatch(
                f"{describe(program.shape)}: compiled, the logits differ by {worst:.3g} from the same graph run op by "
                f"op (tolerance {tolerance:.3g}). It would run wrong, so it is refused. backend='eager' runs the graph "
                "as it is."
            )

    def _compare_variants(self, poor: Program, rich: Program) -> None:
        exact = self._equal(poor, rich, {})
        if exact and poor.variant != "plain":
            exact = self._equal(poor, rich, self._edits(poor.sites))
        name = f"{poor.variant} = {rich.variant}"
        self.found.append(Finding(poor.shape, name, exact, variants=(poor.variant, rich.variant)))

    def _compare_permuted(self, program: Program, first: Env) -> None:
        order = list(reversed(range(min(program.shape.rows, self.arena.positions))))
        turned = self._probe(program, {}, order=order)
        exact = same_bits(turned[LOGITS][: len(order)], first[LOGITS][order])
        self.found.append(Finding(program.shape, "rows permuted", exact))

    def _compare_resumed(self, program: Program, first: Env) -> None:
        exact = True
        for site in program.sites:
            again = self._probe(program, {}, injected={site.name: first[site.name][0].clone()})
            exact = exact and same_bits(again[LOGITS], first[LOGITS])
        self.found.append(Finding(program.shape, "stopped and resumed = uninterrupted", exact))

    def _edits(self, sites: Sequence[Site]) -> dict[str, Armed]:
        edits = {}
        for site in sites:
            edit = Edit(site.name, scale=FACTOR)
            edits[site.name] = arm(0, edit, site, site.dtype or self.dtype, self.device, self.rank)
        return edits

    def _equal(self, poor: Program, rich: Program, edits: Mapping[str, Armed]) -> bool:
        first, second = self._probe(poor, edits), self._probe(rich, edits)
        names = [LOGITS, *(site.name for site in poor.sites if site.name in first and site.name in second)]
        return all(same_bits(first[name], second[name]) for name in names)

    # -- the probe -----------------------------------------------------------------------------

    def _probe(
        self,
        program: Program,
        edits: Mapping[str, Armed],
        *,
        order: Sequence[int] = (),
        injected: Mapping[str, torch.Tensor] | None = None,
    ) -> Env:
        """Run a program on the first positions of the spare row.

        A decode program's rows take one position each, in ``order``; ``injected`` goes into the first row.
        """
        shape = program.shape
        count = min(shape.query, self.arena.positions)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab, (shape.rows, count), generator=generator).tolist()
        batch = []
        for row in order or range(min(shape.rows, self.arena.positions)):
            start = row if count == 1 else 0
            step = Step(start, tuple(tokens[row]), (False,) * count, -1, shape, ((-1, edits),), injected or {})
            batch.append(BatchRow(self.arena.spare_row, step))
            injected = None
        env = step_inputs(batch, shape, self.arena.spare_row, self.device)
        tables = steering_inputs(batch, shape, program.variant, program.sites, self.dtype, self.device, self.rank)
        env |= tables | self.arena.env
        run_segments(program, env, 0, len(program.segments) - 1)
        return env | {site.name: tables[f"{site.name}:tap"] for site in program.sites if f"{site.name}:tap" in tables}


def as_graph(program: Program) -> Program:
    """The same program, its segments run op by op."""
    return replace(program, segments=tuple(replace(each, run=each.graph.forward) for each in program.segments))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; where both are NaN, or the same infinity, it is 0."""
    # In parts: logits in fp64 would take several times the memory that they take.
    parts = zip(a.flatten(0, -2).split(PART), b.flatten(0, -2).split(PART), strict=True)
    return max((_difference(x, y) for x, y in parts if x.numel()), default=0.0)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    wide_a, wide_b = a.double(), b.double()
    gap = (wide_a - wide_b).abs()
    gap = torch.where((wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan()), 0.0, gap)
    return float(torch.nan_to_num(gap, nan=float("inf")).max())


def describe(shape: ProgramShape) -> str:
    """A shape in words."""
    if shape.query == 1:
        return f"decode of {shape.rows} row{'s' * (shape.rows > 1)}"
    return f"prompt chunk of {shape.query}" + (" with all logits" if shape.keep > 1 else "")
