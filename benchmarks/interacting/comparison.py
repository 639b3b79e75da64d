"""Comparison: the same forward pass by us and by the peers: plain, three layers handed out, one layer scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Answer, Work, judge, tolerance
from djinn_fx.benchmarks.context import refused
from djinn_fx.benchmarks.decoder import Peer
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.peers.hooks import HooksDecoder
from djinn_fx.benchmarks.peers.roster import peers, why_not
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import summary

#: Strong enough to be told from noise in bfloat16, whatever the weights.
FACTOR = 0.5


def run(bench: Bench) -> dict[str, Json]:
    """A row per system."""
    works = {
        "plain": Work("plain"),
        "read": Work("three layers handed out", read=bench.layers),
        "scale": Work("one layer scaled", scale={bench.middle: FACTOR}),
    }
    prompt = torch.tensor([bench.prompt], device=bench.device)
    reference = HooksDecoder(bench.loaded)
    right = {key: _answer(reference.forward(prompt, work)) for key, work in works.items()}
    reference.close()
    allowed = tolerance(bench.loaded, prompt)
    found: dict[str, Json] = {"works": {key: work.name for key, work in works.items()}, "systems": {}}
    judged = Judged(bench, works, right, allowed)
    found["systems"]["djinn_fx"] = {**judged.measure("djinn_fx", _ours(bench), lambda work: None), "pauses": True}
    for peer in peers() if bench.context.options.peers else ():
        found["systems"][peer.name] = _peer(bench, peer, judged, prompt)
    return found


def _answer(logits: torch.Tensor) -> Answer:
    """A forward pass as an answer: a row per position, a step each."""
    steps = logits[0].float().cpu()[:, None]
    return Answer(steps.argmax(-1), steps)


class Judged:
    """Times a system's forward pass where its answer is right.

    Attributes:
        bench: the run's setting.
        works: by key.
        right: answers of the eager model with hooks, by key.
        allowed: tolerance.
    """

    def __init__(self, bench: Bench, works: dict[str, Work], right: dict[str, Answer], allowed: float) -> None:
        self.bench, self.works, self.right, self.allowed = bench, works, right, allowed

    def measure(
        self,
        name: str,
        forward: Callable[[Work], torch.Tensor],
        refusal: Callable[[Work], str | None],
        expected: bool = True,
    ) -> dict[str, Json]:
        """Every work's cell."""
        found: dict[str, Json] = {}
        for key, work in self.works.items():
            why = refusal(work)
            if why is not None:
                found[key] = {"unsupported": why}
                continue
            ignored = self.right["plain"] if work.edits else None
            verdict = judge(self.right[key], _answer(forward(work)), self.allowed, ignored)
            check = self.bench.context.check(
                f"{name}: forward, {work.name}", verdict.held, verdict.detail, expected=expected or not work.edits
            )
            found[key] = summary(self._times(forward, work), "ms") if check.held else refused(check)
        return found

    def _times(self, forward: Callable[[Work], torch.Tensor], work: Work) -> list[float]:
        device = self.bench.device
        repeats = self.bench.context.size(12, 2)
        return [1e3 * clock.seconds(device, lambda: forward(work)) for _ in range(repeats + 1)][1:]


def _ours(bench: Bench) -> Callable[[Work], torch.Tensor]:
    """Our forward pass: values are handed out at stops, which copies them to the host as the peers do."""

    def forward(work: Work) -> torch.Tensor:
        with bench.dj.session() as session:
            for layer, factor in work.scale.items():
                session.steer(bench.site(layer), scale=factor)
            run: Any = session.forward(bench.prompt, breakpoints=[bench.site(layer) for layer in work.read])
            for stop in run:
                stop.value.to("cpu")
            logits: torch.Tensor = run.result().logits[None]
        return logits

    return forward


def _peer(bench: Bench, peer: Peer, judged: Judged, prompt: torch.Tensor) -> dict[str, Json]:
    """A peer's cells, or why there are none."""
    why = why_not(peer, bench.loaded, quick=bench.context.options.quick)
    if why is not None:
        bench.context.say(f"{peer.name}: absent, {why}")
        return {"absent": why}

    if peer.no_forward is not None:
        whys = {key: peer.refusal(work) or peer.no_forward for key, work in judged.works.items()}
        unsupported = {key: {"unsupported": why} for key, why in whys.items()}
        return {**unsupported, "pauses": False, "why_not": peer.no_pause()}

    def cells() -> dict[str, Json]:
        decoder = peer.open(bench.loaded, len(bench.prompt) + 16)
        try:
            return judged.measure(
                peer.name, lambda work: decoder.forward(prompt, work), peer.refusal, not peer.expected_wrong
            )
        finally:
            decoder.close()

    return {**bench.context.part(peer.name, cells), "pauses": False, "why_not": peer.no_pause()}
