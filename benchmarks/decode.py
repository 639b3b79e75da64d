"""Decoding speed: milliseconds per token, plain and with interventions, beside the peers and the bandwidth floor.

    python -m benchmarks.decode --out DIR [--model llama-8b-shape] [--quick]

A sample is a block of tokens between two synchronisations, host work included. Every row of a batch takes the same
number of tokens from the same positions in each variant; variants take turns.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from djinn_fx.benchmarks import clock, decode_report
from djinn_fx.benchmarks.answers import Answer, Work, same_bits, tolerance
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.decoder import Decoder, Peer
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.ours import OurDecoder, with_capture, with_edits_of_their_own, with_stops
from djinn_fx.benchmarks.peers.roster import peers, why_not
from djinn_fx.benchmarks.record import Check, Json
from djinn_fx.benchmarks.registry import Benchmark, main
from djinn_fx.benchmarks.stats import summary
from djinn_fx.benchmarks.truth import COMPARED, Truth

#: Factor of every scaling.
FACTOR = 0.95

#: Directions of a rank-k edit, and the edit_rank of the compiled model.
RANK = 2

#: Why a peer has no figure at some numbers of rows.
SHAPES = "it compiles for each number of rows anew; measured at others"

#: Tokens of a peer before the first that is timed.
WARM = 4

#: Bytes of weights from which on a step takes so long that fewer samples tell as much.
LARGE = 4 << 30


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        rows: batch sizes.
        prompt: tokens of each prompt.
        block: tokens per sample.
        blocks: samples between two prompts.
        turns: how often each variant has its turn.
        peer_blocks: samples of a peer.
    """

    rows: tuple[int, ...]
    prompt: int
    block: int
    blocks: int
    turns: int
    peer_blocks: int

    @property
    def room(self) -> int:
        """Positions that a sequence needs."""
        return self.prompt + max(self.blocks, self.peer_blocks) * self.block + 16


def plan_of(context: Context, loaded: Loaded) -> Plan:
    """Sizes for this device and this model."""
    if context.device.type == "cuda" and not context.options.quick:
        if loaded.weight_bytes > LARGE:
            return Plan((1, 32), min(512, loaded.room // 2), 16, 3, 2, 2)
        return Plan((1, 8, 32), min(512, loaded.room // 2), 32, 5, 2, 6)
    if context.device.type == "cuda":
        return Plan((1, 8), min(512, loaded.room // 2), 16, 4, 1, 3)
    return Plan((1, 2) if context.options.quick else (1, 8), min(32, loaded.room // 4), 4, 3, 1, 2)


def works(loaded: Loaded, seed: int) -> dict[str, Work]:
    """What is done while decoding, by a key."""
    layers = range(loaded.layers)
    generator = torch.Generator().manual_seed(seed + 1)
    width = loaded.model.config.get_text_config().hidden_size
    bases = {n: torch.linalg.qr(torch.randn(width, RANK, generator=generator))[0].T.contiguous() for n in layers}
    return {
        "plain": Work("plain"),
        "scale": Work("edits (scale) at every layer", scale=dict.fromkeys(layers, FACTOR)),
        "rank": Work(f"rank-{RANK} edits at every layer", ablate={n: b.to(loaded.device) for n, b in bases.items()}),
    }


def run(context: Context) -> dict[str, Json]:
    """Measure; returns the floor, our rows and the peers' rows."""
    loaded = context.load()
    plan = plan_of(context, loaded)
    prompts = loaded.prompts(max(plan.rows), plan.prompt, context.options.seed)
    bandwidth = clock.read_bandwidth(context.device)
    found: dict[str, Json] = {
        "plan": {**vars(plan), "edit_rank": RANK},
        "bandwidth_bytes_per_second": bandwidth,
        "weight_bytes": loaded.weight_bytes,
        "floor_ms": 1e3 * loaded.read_bytes / bandwidth,
        "tolerance": tolerance(loaded, prompts[:1]),
    }
    truth = Truth(loaded, prompts, works(loaded, context.options.seed), found["tolerance"])
    ours = Ours(context, loaded, plan, prompts, truth)
    found["ours"] = ours.run()
    found["memory"] = ours.memory
    context.say(f"memory, MiB: { {name: size >> 20 for name, size in ours.memory.items()} }")
    theirs = Theirs(context, loaded, plan, prompts, truth)
    found["peers"] = {peer.name: theirs.run(peer) for peer in peers()} if context.options.peers else {}
    return found


Variant = tuple[OurDecoder, Work, Check]


class Ours:
    """Our rows."""

    def __init__(self, context: Context, loaded: Loaded, plan: Plan, prompts: torch.Tensor, truth: Truth) -> None:
        self.context, self.loaded, self.plan, self.prompts, self.truth = context, loaded, plan, prompts, truth
        self.memory: dict[str, Json] = {}

    def run(self) -> dict[str, Json]:
        """Every variant at every number of rows."""
        most = min(max(self.plan.rows), 32)
        room = min(self.plan.room, self.loaded.room)
        dj = self.context.compile(self.loaded, max_sessions=most, max_length=room, edit_rank=RANK)
        self.context.say(str(dj.receipt))
        try:
            checked = self.context.part("our answers", lambda: self._variants(dj))
            if not isinstance(checked, dict) or "failed" in checked or "skipped" in checked:
                return {"all": checked}
            found = {
                str(rows): self.context.part(f"djinn_fx, {rows} rows", lambda rows=rows: self._rows(rows, checked))  # type: ignore[misc]
                for rows in self.plan.rows
            }
            self.memory = _memory(self.loaded, dj)
            return found
        finally:
            dj.close()

    def _variants(self, dj: Any) -> dict[str, Variant]:
        """Every variant with the check of its answer."""
        loaded, works_ = self.loaded, self.truth.works
        middle = loaded.layers // 2
        plain = OurDecoder(loaded, dj)
        found: dict[str, Variant] = {}
        answers: dict[str, Answer] = {}
        for key, work in works_.items():
            answers[key] = plain.answer(self.prompts[:1], work, COMPARED)
            verdict = self.truth.judge(key, answers[key])
            found[key] = (plain, work, self.context.check(f"djinn_fx: {work.name}", verdict.held, verdict.detail))
        idle = Work("plain")
        steered = self._steered(dj, middle)
        others = {
            "capture": (with_capture(loaded, dj), answers["plain"], "captured at every layer"),
            "untouched": (with_stops(loaded, dj, middle, None), answers["plain"], "stopped every token, untouched"),
            "edited": (with_stops(loaded, dj, middle, FACTOR), steered, "stopped every token, edited"),
        }
        for key, (decoder, expected, name) in others.items():
            answer = decoder.answer(self.prompts[:1], idle, COMPARED)
            assert answer.logits is not None and expected.logits is not None
            held = same_bits(answer.logits, expected.logits)
            like = "steering from the first generated token on" if key == "edited" else "plain"
            alike = self.context.check(f"djinn_fx: {name} = {like}, bit for bit", held)
            # Equal to a wrong answer is wrong too.
            found[key] = (decoder, Work(name), alike if found["plain"][2].held else found["plain"][2])
        return found

    def _steered(self, dj: Any, layer: int) -> Answer:
        """The answer under an edit of the generated positions, which editing at every stop must equal."""
        with dj.session() as session:
            session.steer(f"resid_post.{layer}", scale=FACTOR, positions="generated")
            run = session.generate(self.prompts[0].tolist(), max_new_tokens=COMPARED, output_logits=True)
            result = run.result()
        return Answer(result.tokens[None, self.plan.prompt :], result.logits[None].cpu())

    def _rows(self, rows: int, variants: dict[str, Variant]) -> dict[str, Json]:
        """All variants at one number of rows, in turns of shuffled order."""
        if rows > 1:
            variants = self._checked(rows, variants)
        samples: dict[str, list[float]] = {key: [] for key, (_, _, check) in variants.items() if check.held}
        order = random.Random(self.context.options.seed)
        for _ in range(self.plan.turns):
            for key in order.sample(sorted(samples), len(samples)):
                decoder, work, _ = variants[key]
                decoder.start(self.prompts[:rows], work)
                decoder.block_seconds(2)
                samples[key] += _blocks(decoder.block_seconds, self.plan.blocks, self.plan.block)
                decoder.close()
        return {
            key: {"name": work.name, **(summary(samples[key], "ms") if check.held else refused(check))}
            for key, (_, work, check) in variants.items()
        }

    def _checked(self, rows: int, variants: dict[str, Variant]) -> dict[str, Variant]:
        """The variants with the checks of a batch; where one row is edited at its stops, the others are compared."""
        varied = with_edits_of_their_own(self.loaded, variants["plain"][0].dj)
        work = replace(self.truth.works["scale"], name="edits (scale) at every layer, other in each row")
        todo = {**variants, "varied": (varied, work, Check("varied", True))}
        found = {}
        for key, (decoder, doing, alone) in todo.items():
            right = key if key in (*self.truth.works, "varied") else "plain"
            answer = decoder.answer(self.prompts[:rows], doing, COMPARED)
            verdict = self.truth.judge(right, answer, after=int(key == "edited"))
            name = f"djinn_fx: {doing.name}, {rows} rows"
            check = self.context.check(name, verdict.held and alone.held, verdict.detail if alone.held else alone.name)
            found[key] = (decoder, doing, check)
        return found


class Theirs:
    """The peers' rows."""

    def __init__(self, context: Context, loaded: Loaded, plan: Plan, prompts: torch.Tensor, truth: Truth) -> None:
        self.context, self.loaded, self.plan, self.prompts, self.truth = context, loaded, plan, prompts, truth
        self._warm: set[tuple[str, int]] = set()
        self.works = {**truth.works, "read": Work("three layers read to the host", read=_three(loaded.layers))}

    def run(self, peer: Peer) -> dict[str, Json]:
        """One peer's rows; why there are none if it cannot run."""
        why = why_not(peer, self.loaded, quick=self.context.options.quick)
        if why is not None:
            self.context.say(f"{peer.name}: absent, {why}")
            return {"absent": why}
        found = self.context.part(peer.name, lambda: self._measure(peer))
        return dict(found)

    def _measure(self, peer: Peer) -> dict[str, Json]:
        decoder = peer.open(self.loaded, min(self.plan.room, self.loaded.room))
        try:
            return {key: self._work(peer, decoder, key) for key in ("plain", "scale", "read")}
        finally:
            decoder.close()

    def _work(self, peer: Peer, decoder: Decoder, key: str) -> dict[str, Json]:
        work = self.works[key]
        why = peer.refusal(work)
        if why is not None:
            return {"unsupported": why}
        counts = _counts(peer, key, self.plan.rows, large=self.loaded.weight_bytes > LARGE)
        return {
            str(rows): self._rows(peer, decoder, key, rows) if rows in counts else {"skipped": SHAPES}
            for rows in self.plan.rows
        }

    def _rows(self, peer: Peer, decoder: Decoder, key: str, rows: int) -> dict[str, Json]:
        work = self.works[key]
        if self.context.over:
            return {"skipped": "the budget was spent"}
        answer = decoder.answer(self.prompts[:rows], work, COMPARED)
        verdict = self.truth.judge("plain" if key == "read" else key, answer)
        meant = not peer.expected_wrong or not work.edits
        name = f"{peer.name}: {work.name}, {rows} rows"
        check = self.context.check(name, verdict.held, verdict.detail, expected=meant)
        if not check.held:
            return refused(check)
        self._warm_up(peer, decoder, work, rows)
        decoder.start(self.prompts[:rows], work)
        decoder.block_seconds(WARM)
        return summary(_blocks(decoder.block_seconds, self.plan.peer_blocks, self.plan.block), "ms")

    def _warm_up(self, peer: Peer, decoder: Decoder, work: Work, rows: int) -> None:
        """Decode over every length that will be timed: attention may prepare something for each new one.

        With a cache that grows by a token PyTorch's SDPA on an H100 took some 50 ms the first time it met a length, and
        6 ms from then on.
        """
        if (peer.name, rows) not in self._warm:
            decoder.start(self.prompts[:rows], work)
            decoder.block_seconds(WARM + self.plan.peer_blocks * self.plan.block)
            self._warm.add((peer.name, rows))


def _memory(loaded: Loaded, dj: Any) -> dict[str, Json]:
    """Bytes by component, and on CUDA those of the whole device beyond weights and KV, other processes included."""
    found = dict(dj.memory())
    if loaded.device.type == "cuda":
        clock.clear(loaded.device)
        found["reserved"] = torch.cuda.memory_reserved(loaded.device)
        found["device_used"] = clock.device_used(loaded.device)
        found["beyond_weights_and_kv"] = found["device_used"] - found["weights"] - found["kv"]
    return found


def _blocks(take: Callable[[int], float], blocks: int, size: int) -> list[float]:
    """Milliseconds per token of so many blocks."""
    return [1e3 * take(size) / size for _ in range(blocks)]


def _counts(peer: Peer, key: str, rows: tuple[int, ...], *, large: bool) -> tuple[int, ...]:
    """The numbers of rows at which a peer is measured: fewer where each takes a compilation, of a minute if large."""
    if not peer.compiles:
        return rows
    return (rows[0], rows[-1]) if key == "plain" and not large else rows[:1]


def _three(layers: int) -> tuple[int, ...]:
    return tuple(sorted({layers // 4, layers // 2, 3 * layers // 4}))


BENCHMARK = Benchmark(
    name="decode",
    run=run,
    tables=decode_report.tables,
    pictures=decode_report.pictures,
)

if __name__ == "__main__":
    sys.exit(main("decode"))
