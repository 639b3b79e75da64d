"""Decode steps on the device alone: our graphs against the same captured graph compiled whole, replay against replay.

    python -m benchmarks.steps --out DIR [--model llama-8b-shape] [--quick]

``whole`` is the graph that ours are made of, without sites and without cuts, compiled by Inductor with the same
settings into one CUDA graph over the same static buffers and the same arena. A sample is a number of replays back to
back between two events, behind a few that are not counted; the arms take turns in rotating order, ``whole`` twice as
the control. Positions go on from the end of real prompts and are put back before each sample.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock, decode, steps_report
from djinn_fx.benchmarks.answers import Answer, Judgement, Work, judge, same_bits, tolerance
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.decode import FACTOR, LARGE, RANK
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.peers.hooks import HooksDecoder
from djinn_fx.benchmarks.record import Check, Json
from djinn_fx.benchmarks.registry import Benchmark, main
from djinn_fx.benchmarks.replays import Replays
from djinn_fx.benchmarks.stats import overhead, rotated, summary
from djinn_fx.specs import Variant

#: Steps whose logits are compared.
COMPARED = 4

#: Prompts at which the model's noise is measured.
NOISE_ROWS = 8

#: Rounds that are taken even if the budget is spent.
FEWEST = 8

#: Our arms: the program variant, and what acts in it.
OURS: dict[Variant, str] = {
    "plain": "plain",
    "armed": f"armed: scaled by {FACTOR} at every layer",
    "rank": f"rank: scaled, and {RANK} directions ablated, at every layer",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        rows: batch sizes.
        prompt: tokens of each prompt.
        room: positions per session; that of ``decode``, so that Inductor's cache serves both.
        replays: per sample.
        warm: replays before each sample that are not counted.
        rounds: samples of each arm.
    """

    rows: tuple[int, ...]
    prompt: int
    room: int
    replays: int
    warm: int
    rounds: int


def sizes_of(context: Context, loaded: Loaded) -> Sizes:
    """Sizes for this device and this model."""
    plan = decode.plan_of(context, loaded)
    rows = (plan.rows[0], plan.rows[-1])
    room = min(plan.room, loaded.room)
    if context.device.type != "cuda":
        return Sizes(rows, plan.prompt, room, 3, 1, context.size(24, FEWEST))
    if loaded.weight_bytes > LARGE:
        return Sizes(rows, plan.prompt, room, 5, 2, context.size(60, 12))
    return Sizes(rows, plan.prompt, room, 20, 3, context.size(120, 16))


def run(context: Context) -> dict[str, Json]:
    """Measure at each number of rows."""
    loaded = context.load()
    sizes = sizes_of(context, loaded)
    prompts = loaded.prompts(max(sizes.rows), sizes.prompt, context.options.seed)
    bandwidth = clock.read_bandwidth(context.device)
    found: dict[str, Json] = {
        "sizes": {**vars(sizes), "edit_rank": RANK},
        "arms": {**OURS, "whole": "whole", "whole again": "whole again (control)"},
        "bandwidth_bytes_per_second": bandwidth,
        "weight_bytes": loaded.weight_bytes,
        "floor_ms": 1e3 * loaded.read_bytes / bandwidth,
        "tolerance": tolerance(loaded, prompts[:NOISE_ROWS]),
        "rows": {},
    }
    clock.clear(context.device)
    # What `verify` would compare is compared below, at the sizes that are measured.
    dj = context.compile(loaded, max_sessions=max(sizes.rows), max_length=sizes.room, edit_rank=RANK, verify=False)
    try:
        for rows in sizes.rows:
            here = Rows(context, loaded, dj, prompts[:rows], sizes, found["tolerance"])
            entry = context.part(f"{rows} rows", here.run)
            if "arms" in entry:
                kv = rows * sizes.prompt * dj.engine.arena.bytes_per_position
                entry["floor_with_kv_ms"] = 1e3 * (loaded.read_bytes + kv) / bandwidth
            found["rows"][str(rows)] = entry
    finally:
        dj.close()
    return found


class Rows:
    """One number of rows: what is right, then how long it takes."""

    def __init__(
        self, context: Context, loaded: Loaded, dj: djinn.Dj, prompts: torch.Tensor, sizes: Sizes, allowed: float
    ) -> None:
        self.context, self.loaded, self.dj, self.prompts = context, loaded, dj, prompts
        self.sizes, self.allowed = sizes, allowed
        bases = decode.works(loaded, context.options.seed)["rank"].ablate
        layers = range(loaded.layers)
        self.edits: dict[str, list[djinn.Edit]] = {
            "plain": [],
            "armed": [djinn.Edit(f"resid_post.{layer}", scale=FACTOR) for layer in layers],
            "rank": [djinn.Edit(f"resid_post.{layer}", scale=FACTOR, ablate=bases[layer]) for layer in layers],
        }

    def run(self) -> dict[str, Json]:
        """The arms' samples, each arm's only if its answer is right."""
        right: dict[str, Answer] = {variant: self._through_sessions(variant) for variant in OURS}
        check = self._against_eager(right["plain"])
        if not check.held:
            return refused(check)
        sessions, _ = self._opened()
        try:
            _steer(sessions[:1], self.edits["rank"])  # replays take the first one's edits for all
            replays = Replays(self.dj, sessions)
            arms: dict[str, Any] = {variant: replays.ours(variant) for variant in OURS}
            ran = {name: str(arm.program.variant) for name, arm in arms.items()}
            replays.arm()
            checks = {name: self._check_ours(replays, arm, right[ran[name]], name) for name, arm in arms.items()}
            whole = self.context.part(f"the graph compiled whole, {len(self.prompts)} rows", replays.whole)
            cells: dict[str, Json] = {}
            bitwise = None
            if isinstance(whole, dict):  # why it could not be made
                cells = {name: dict(whole) for name in ("whole", "whole again")}
            else:
                arms["whole"] = arms["whole again"] = whole
                checks["whole"], bitwise = self._check_whole(replays, whole, right["plain"])
                checks["whole again"] = checks["whole"]
            samples = self._samples(replays, {name: arm for name, arm in arms.items() if checks[name].held})
        finally:
            for session in sessions:
                session.close()
        cells |= {name: self._cell(samples, name, check) for name, check in checks.items()}
        return {"arms": cells, "ran": ran, "whole_bitwise": bitwise}

    # -- what is right -------------------------------------------------------------------------

    def _opened(self) -> tuple[list[djinn.Session], torch.Tensor]:
        """Sessions that took their prompts, nothing steered, and the logits of their first tokens."""
        sessions, firsts = [], []
        for row in self.prompts.tolist():
            session = self.dj.session()
            sessions.append(session)
            first = session.generate(row, max_new_tokens=1, output_logits=True).result().logits
            assert first is not None
            firsts.append(first)
        return sessions, torch.stack(firsts)

    def _through_sessions(self, variant: str) -> Answer:
        """What the public API gives: the first token of each row, and the steps that are compared."""
        sessions, first = self._opened()
        try:
            _steer(sessions, self.edits[variant])
            runs = [session.generate(None, max_new_tokens=COMPARED, output_logits=True) for session in sessions]
            results = self.dj.results(runs)
            tokens = torch.stack([session.tokens[self.prompts.shape[1] :] for session in sessions])
        finally:
            for session in sessions:
                session.close()
        logits = torch.cat([first, torch.stack([result.logits for result in results])], 1).cpu()  # type: ignore[misc]
        return Answer(tokens, logits)

    def _against_eager(self, ours: Answer) -> Check:
        """Plain decoding against the eager model; a wrong one leaves nothing to measure."""
        decoder = HooksDecoder(self.loaded)
        reference = decoder.answer(self.prompts, Work("plain"), COMPARED + 1)
        decoder.close()
        verdict = judge(reference, ours, self.allowed)
        return self.context.check(f"plain = the eager model, {len(self.prompts)} rows", verdict.held, verdict.detail)

    def _check_ours(self, replays: Replays, arm: Any, right: Answer, name: str) -> Check:
        """One of our graphs against the public API: other bits fail the run, beyond tolerance it has no speed."""
        assert right.logits is not None
        found, expected = replays.answer(arm, COMPARED), Answer(right.tokens[:, 1:], right.logits[:, 1:])
        assert found.logits is not None and expected.logits is not None
        said = "" if arm.program.variant == name else f"it runs as {arm.program.variant}"
        what = f"{name} replayed = decoded through sessions, bit for bit, {replays.rows} rows"
        check = self.context.check(what, same_bits(found.logits, expected.logits), said)
        if check.held:
            return check
        verdict = judge(expected, found, self.allowed)
        return Check(what, verdict.held, verdict.detail)

    def _check_whole(self, replays: Replays, whole: Any, right: Answer) -> tuple[Check, bool]:
        """The whole graph against our plain one: within tolerance, and whether bit for bit."""
        assert right.logits is not None
        found, plain = replays.answer(whole, COMPARED), Answer(right.tokens[:, 1:], right.logits[:, 1:])
        assert found.logits is not None and plain.logits is not None
        bitwise = same_bits(found.logits, plain.logits)
        verdict = Judgement(True, "the same bits") if bitwise else judge(plain, found, self.allowed)
        name = f"the graph compiled whole = plain, {replays.rows} rows"
        return self.context.check(name, verdict.held, verdict.detail), bitwise

    # -- how long it takes ---------------------------------------------------------------------

    def _samples(self, replays: Replays, arms: dict[str, Any]) -> dict[str, list[float]]:
        """Milliseconds per replay, arms in rotating order."""
        found: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(self.sizes.rounds if arms else 0):
            for name in rotated(list(arms), turn):
                taken = replays.seconds(arms[name], self.sizes.replays, self.sizes.warm)
                found[name].append(1e3 * taken)
            if self.context.over and turn + 1 >= FEWEST:
                self.context.say(f"the budget is spent: {turn + 1} of {self.sizes.rounds} rounds")
                break
        return found

    def _cell(self, samples: dict[str, list[float]], name: str, check: Check) -> dict[str, Json]:
        """An arm's summary and its ratios to the whole graph and to our plain one."""
        if not check.held:
            return refused(check)
        seed = self.context.options.seed
        against = {
            f"against_{base}": overhead(samples[base], samples[name], seed=seed)
            for base in ("whole", "plain")
            if base in samples
        }
        return {**summary(samples[name], "ms"), **against}


def _steer(sessions: Sequence[djinn.Session], edits: Sequence[djinn.Edit]) -> None:
    for session in sessions:
        for edit in edits:
            session.steer(edit)


BENCHMARK = Benchmark(
    name="steps",
    run=run,
    tables=steps_report.tables,
    pictures=steps_report.pictures,
)

if __name__ == "__main__":
    sys.exit(main("steps"))
