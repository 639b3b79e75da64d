"""The receipt: how exact a compiled model was measured to be.

The captured model is compared with the eager one on a probe that crosses a chunk boundary and, where the model has one
within reach, a sliding window, and then decodes four tokens. The yardstick is the model's own: four times the
difference between two attention implementations of Hugging Face on the same probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from djinn_fx.errors import CaptureMismatch
from djinn_fx.notebook import Shown
from djinn_fx.runtime.agreement import Agreements, Finding, describe, difference
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.engine import Engine
from djinn_fx.runtime.executor import Executor, RowValues
from djinn_fx.runtime.observe import Observer
from djinn_fx.runtime.programs import SMALLEST_CHUNK, ProgramCache, bucket
from djinn_fx.runtime.steps import Step
from djinn_fx.runtime.tables import BatchRow
from djinn_fx.sites import Site
from djinn_fx.specs import ProgramShape
from djinn_fx.views import Table, View

DECODED = 4

#: The longest chunk of a compiled model that the probe takes as it is served; a longer one would take eager attention
#: too much memory.
LONGEST_CHUNK = 1024


class ReferenceLike(Protocol):
    """One eager forward pass: ``logits`` ``[T, vocab]`` and ``blocks``: module path to ``[T, hidden]``."""

    @property
    def logits(self) -> torch.Tensor:
        """Logits ``[T, vocab]``."""

    @property
    def blocks(self) -> dict[str, torch.Tensor]:
        """Block outputs by module path."""


ReferenceRun = Callable[[list[int], str, tuple[str, ...]], ReferenceLike | None]


@dataclass(frozen=True)
class Check:
    """One comparison of a receipt.

    Attributes:
        name: what was compared.
        verdict: ``"bitwise"``, ``"within tolerance"``, ``"differs"`` or ``"not applicable"``.
        worst: largest difference found, NaN counted as equal to NaN.
        tolerance: the yardstick; 0 for bitwise checks.
    """

    name: str
    verdict: str
    worst: float = 0.0
    tolerance: float = 0.0


@dataclass(frozen=True)
class Receipt(Shown):
    """The measured statement of how exact a compiled model is.

    Attributes:
        probe: tokens of the probe.
        checks: the comparisons made.
        pending: names of comparisons still to be made.
        nonfinite: whether the model's own numbers hold NaN or Inf.
    """

    probe: int
    checks: tuple[Check, ...]
    pending: tuple[str, ...] = ()
    nonfinite: bool = False

    @property
    def exact(self) -> bool:
        """Whether every bitwise check held."""
        return all(check.verdict != "differs" for check in self.checks)

    def describe(self) -> View:
        """Every comparison with its verdict; notebooks show it."""
        rows = tuple(
            (
                c.name,
                c.verdict,
                f"{c.worst:.2e}" if c.worst or c.tolerance else "",
                f"{c.tolerance:.2e}" * bool(c.tolerance),
            )
            for c in self.checks
        )
        note = f"compared when first needed: {'; '.join(self.pending)}" if self.pending else ""
        strong = tuple(index for index, check in enumerate(self.checks) if check.verdict == "differs")
        table = Table("", ("compared", "verdict", "worst", "tolerance"), (True, True, False, False), rows, note, strong)
        facts = [("probe", f"{self.probe} tokens, {DECODED} of them decoded")]
        if self.nonfinite:
            facts.append(("the model itself", "its own logits hold NaN or infinities"))
        return View("Receipt", "nothing differs" if self.exact else "SOMETHING DIFFERS", tuple(facts), (table,))

    def __str__(self) -> str:
        lines = [f"receipt (probe of {self.probe} tokens, {DECODED} of them decoded)"]
        for check in self.checks:
            size = f", worst {check.worst:.2e} of {check.tolerance:.2e}" if check.tolerance else ""
            lines.append(f"  {check.name}: {check.verdict}{size}")
        if self.pending:
            lines.append(f"  compared when first needed: {'; '.join(self.pending)}")
        return "\n".join(lines)


def make_receipt(engine: Engine, observer: Observer, reference: ReferenceRun) -> Receipt:
    """Measure a compiled model.

    Raises:
        CaptureMismatch: the captured model differs from eager beyond tolerance; names the first diverging site.
    """
    tokens = _probe_tokens(engine, observer)
    posts = tuple(site for site in engine.table.sites if site.role == "resid_post" and site.module)
    paths = tuple(site.module for site in posts)
    eager = reference(tokens, "eager", paths)
    assert eager is not None
    other = reference(tokens, "sdpa", ())
    compiled = engine.programs.agreements is not None
    captured = _Captured(engine, observer.programs if compiled else engine.programs, tokens, posts)
    logits, blocks = captured.run()
    checks = [_compare_eager(eager, other, logits, blocks, posts)]
    if not compiled:  # else each program is compared when it is made
        checks += captured.bit_checks()
    bad = not bool(torch.isfinite(eager.logits).all())
    if bad:
        warnings.warn(
            "the model's own logits hold NaN or Inf on the probe; djinn runs it as it is. "
            "dj.first_nonfinite(inputs) finds the first such site.",
            stacklevel=3,
        )
    return Receipt(len(tokens), tuple(checks), nonfinite=bad)


def with_agreements(receipt: Receipt, agreements: Agreements) -> Receipt:
    """A receipt with what was found since of the variants of each program."""
    checks = tuple(_check(each) for each in agreements.found)
    return replace(receipt, checks=(*receipt.checks, *checks), pending=agreements.pending())


def _check(finding: Finding) -> Check:
    held = "within tolerance" if finding.tolerance else "bitwise"
    name = f"{describe(finding.shape)}: {finding.name}"
    return Check(name, held if finding.exact else "differs", finding.worst, finding.tolerance)


def _probe_tokens(engine: Engine, observer: Observer) -> list[int]:
    """Pseudo-random tokens, long enough to cross a chunk boundary and the window where they fit."""
    windows = [window for window in observer.windows if window]
    wanted = max([(_served_chunk(engine) or SMALLEST_CHUNK) + 8, *(window + 8 for window in windows)])
    count = max(2, min(wanted + DECODED, engine.options.max_length))
    vocab = engine.options.vocab_size
    generator = torch.Generator().manual_seed(0)
    return [int(token) for token in torch.randint(0, vocab, (count,), generator=generator)]


def _served_chunk(engine: Engine) -> int | None:
    """Tokens of a full chunk, where the probe is to consist of such: their programs are captured in any case.

    None for an eager model, which captures small chunks as quickly, and where the probe would not fit.
    """
    options = engine.options
    fits = options.prefill_chunk <= LONGEST_CHUNK and options.prefill_chunk + 8 + DECODED <= options.max_length
    return options.prefill_chunk if engine.programs.agreements is not None and fits else None


def _compare_eager(
    eager: ReferenceLike,
    other: ReferenceLike | None,
    logits: torch.Tensor,
    blocks: dict[str, torch.Tensor],
    posts: Sequence[Site],
) -> Check:
    noise = 0.0 if other is None else difference(eager.logits, other.logits)
    tolerance = max(4 * noise, _floor(eager.logits))
    worst = difference(eager.logits, logits)
    if worst <= tolerance:
        return Check("captured = eager", "within tolerance", worst, tolerance)
    first = "logits"
    for site in posts:
        ours, theirs = blocks[site.name], eager.blocks[site.module]
        if difference(theirs, ours) > max(_floor(theirs), tolerance * _size(theirs) / _size(eager.logits)):
            first = site.name
            break
    raise CaptureMismatch(
        f"the captured model differs from the eager one: logits by {worst:.3g} (tolerance {tolerance:.3g}), first at "
        f"site {first!r}. It would run wrong, so it is refused. djinn.check(model) says what is known of this "
        "architecture; verify=False compiles it all the same."
    )


def _size(tensor: torch.Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)]
    return max(float(finite.abs().max()), 1e-30) if finite.numel() else 1.0


def _floor(tensor: torch.Tensor) -> float:
    """What rounding alone explains: 64 units in the last place of the largest value."""
    return 64 * torch.finfo(tensor.dtype).eps * _size(tensor)


class _Captured:
    """The captured model on the probe; a compiled one op by op, which spares compilations that nobody needs."""

    def __init__(self, engine: Engine, programs: ProgramCache, tokens: list[int], posts: Sequence[Site]) -> None:
        self.engine, self.tokens = engine, tokens
        self.served = _served_chunk(engine) is not None
        names = {site.name: site for site in (*engine.sites, *posts)}
        self.sites = tuple(sorted(names.values(), key=lambda site: site.order))
        rank = engine.options.edit_rank
        self.executor = Executor(programs, engine.arena, self.sites, engine.dtype, engine.device, rank)
        self.posts = posts

    def run(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Prompt in chunks, then decode; returns logits ``[T, vocab]`` and every block's output."""
        row = self.engine.arena.take()[0]
        logits: list[torch.Tensor] = []
        blocks: dict[str, list[torch.Tensor]] = {site.name: [] for site in self.posts}
        try:
            prompt = max(1, len(self.tokens) - DECODED)
            size = min(SMALLEST_CHUNK, self.engine.options.prefill_chunk)
            if self.served or prompt > 8 * SMALLEST_CHUNK:
                size = self.engine.options.prefill_chunk
            for start in range(0, prompt, size):
                stop = min(start + size, prompt)
                env = self._chunk(row, start, stop, size)
                logits.append(env["logits"][0, : stop - start].clone())
                for site in self.posts:
                    blocks[site.name].append(env[site.name][0, : stop - start].clone())
            for start in range(prompt, len(self.tokens)):
                values = self.executor.decode_one(BatchRow(row, self._step(start, start + 1, 1)))
                logits.append(values.logits.clone())
                for site in self.posts:
                    blocks[site.name].append(values.value(site).clone())
            self.last_row_logits = logits[-1]
            return torch.cat(logits), {name: torch.cat(parts) for name, parts in blocks.items()}
        finally:
            self.engine.arena.release(row)

    def _chunk(self, row: int, start: int, stop: int, size: int) -> dict[str, torch.Tensor]:
        query = size if self.served else min(size, bucket(stop - start, SMALLEST_CHUNK)) if size > 1 else 1
        chunk = self.executor.begin(BatchRow(row, self._step(start, stop, query)))
        self.executor.advance(chunk, None)
        return chunk.env

    def _step(self, start: int, stop: int, query: int, rows: int = 1) -> Step:
        tokens = tuple(self.tokens[start:stop])
        shape = ProgramShape(rows, query, query)
        return Step(start, tokens, (False,) * len(tokens), -1, shape, ())

    def bit_checks(self) -> list[Check]:
        """Bitwise comparisons: rows permuted, stopped and resumed by injection."""
        engine = self.engine
        if engine.options.max_sessions < 2 or engine.arena.free_rows < 2:
            return [Check("rows permuted", "not applicable")]
        rows = engine.arena.take(2)
        try:
            cut = min(4, len(self.tokens) - 1)
            for row, shift in zip(rows, (0, 1), strict=True):
                step = self._step(shift, shift + cut, SMALLEST_CHUNK)
                step = Step(0, step.tokens, step.sampled, -1, step.shape, ())
                chunk = self.executor.begin(BatchRow(row, step))
                self.executor.advance(chunk, None)
            last = self.tokens[cut]
            one = Step(cut, (last,), (False,), -1, ProgramShape(2, 1, 1), ())
            a = self._decode([BatchRow(rows[0], one), BatchRow(rows[1], one)])
            b = self._decode([BatchRow(rows[1], one), BatchRow(rows[0], one)])
            swapped = same_bits(a[0].logits, b[1].logits) and same_bits(a[1].logits, b[0].logits)
            return [
                Check("rows permuted", "bitwise" if swapped else "differs"),
                self._injection(rows, one, a[0].logits),
            ]
        finally:
            for row in rows:
                engine.arena.release(row)

    def _decode(self, batch: Sequence[BatchRow]) -> list[RowValues]:
        return [values for values in self.executor.decode(batch) if values is not None]

    def _injection(self, rows: list[int], one: Step, whole: torch.Tensor) -> Check:
        """Stop at every compiled site and resume by injection: equal to the uninterrupted step?"""
        batch = [BatchRow(row, one) for row in rows]
        plain = self._decode(batch)
        same = True
        for site in self.engine.sites:
            injected = one.edited(site.name, plain[0].value(site).clone())
            again = self._decode([BatchRow(rows[0], injected), batch[1]])
            same = same and same_bits(again[0].logits, whole)
        return Check("stopped and resumed = uninterrupted", "bitwise" if same else "differs")
