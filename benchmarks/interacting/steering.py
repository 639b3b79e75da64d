"""Steering: one layer times 0.9, and the same by forward hooks."""

from __future__ import annotations

from typing import Any

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Work, distance, same_bits, tolerance
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.peers.hooks import HooksDecoder
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import overhead, summary

#: The original's factor.
FACTOR = 0.9


def run(bench: Bench) -> dict[str, Json]:
    """Tokens changed, repeatability, cost, and agreement with hooks."""
    context, site = bench.context, bench.site(bench.middle)
    trials = [_forward(bench, site) for _ in range(bench.trials)]
    steered = trials[0]
    repeatable = context.check("steering gives the same bits each time", all(same_bits(t, steered) for t in trials))
    at_stop = _by_stop(bench, site)
    agree = context.check("editing at the stop = steering, bit for bit", same_bits(at_stop, steered))
    hooked = bench.dj.run_with_hooks(bench.prompt, fwd_hooks=[(site, lambda value, hook: value * FACTOR)])[0]
    own = distance(hooked, steered)
    changed = int((steered.argmax(-1) != bench.whole.argmax(-1)).sum())
    found: dict[str, Json] = {
        "layer": bench.middle,
        "factor": FACTOR,
        "tokens": len(bench.prompt),
        "tokens_changed": changed,
        "logits_moved": distance(steered, bench.whole),
        "repeatable": repeatable.held,
        "run_with_hooks": {"bitwise": same_bits(hooked, steered), "distance": own},
        "hooks": _by_hooks(bench, steered),
    }
    if repeatable.held and agree.held and found["hooks"]["right"]:
        found["cost"] = _cost(bench, site)
    else:
        found["cost"] = {"refused": "wrong result: see the checks"}
    return found


def _forward(bench: Bench, site: str | None) -> torch.Tensor:
    """Logits of the whole prompt, steered or not."""
    with bench.dj.session() as session:
        if site is not None:
            session.steer(site, scale=FACTOR)
        logits: torch.Tensor = session.forward(bench.prompt).result().logits.clone()
    return logits


def _by_stop(bench: Bench, site: str) -> torch.Tensor:
    with bench.dj.session() as session:
        run = session.forward(bench.prompt, breakpoints=[site])
        for stop in run:
            stop.value.mul_(FACTOR)
        logits: torch.Tensor = run.result().logits.clone()
    return logits


def _by_hooks(bench: Bench, steered: torch.Tensor) -> dict[str, Json]:
    """The same with a forward hook on the eager model: tokens that differ, with and without steering."""
    decoder = HooksDecoder(bench.loaded)
    prompt = torch.tensor([bench.prompt], device=bench.device)
    plain = decoder.forward(prompt, Work("plain"))[0].to(bench.whole.device)
    work = Work("steering", scale={bench.middle: FACTOR})
    hooked = decoder.forward(prompt, work)[0].to(bench.whole.device)
    decoder.close()
    allowed = tolerance(bench.loaded, prompt)
    apart = distance(steered, hooked)
    differ = _parted(steered, hooked, allowed)
    check = bench.context.check(
        "steering = the same forward hook on the eager model",
        apart <= allowed and differ["beyond_ties"] == 0,
        f"logits within {apart:.1e}, tolerance {allowed:.1e}; {differ['tokens']} of {len(bench.prompt)} tokens differ, "
        f"{differ['beyond_ties']} of them beyond ties",
    )
    return {
        "right": check.held,
        "distance": apart,
        "tolerance": allowed,
        "tokens_changed": int((hooked.argmax(-1) != plain.argmax(-1)).sum()),
        "tokens_that_differ": differ["tokens"],
        "beyond_ties": differ["beyond_ties"],
        "tokens_that_differ_unsteered": _parted(bench.whole, plain, allowed)["tokens"],
    }


def _parted(ours: torch.Tensor, theirs: torch.Tensor, allowed: float) -> dict[str, int]:
    """Positions whose most likely token differs, and those where it is no tie within the tolerance."""
    a, b = ours.argmax(-1), theirs.argmax(-1)
    gaps = theirs.float().gather(-1, b[:, None]) - theirs.float().gather(-1, a[:, None])
    beyond = (gaps[:, 0] > 8 * allowed * theirs.float().std(-1)).sum()
    return {"tokens": int((a != b).sum()), "beyond_ties": int(beyond)}


def _cost(bench: Bench, site: str) -> dict[str, Json]:
    """Milliseconds of a forward pass with and without steering, in turns."""
    samples: dict[str, list[float]] = {"plain": [], "steered": []}
    for turn in range(bench.context.size(40, 3)):
        order: list[Any] = [("plain", None), ("steered", site)]
        for name, where in order if turn % 2 else reversed(order):
            samples[name].append(1e3 * clock.seconds(bench.device, lambda where=where: _forward(bench, where)))  # type: ignore[misc]
    return {
        **{name: summary(values, "ms") for name, values in samples.items()},
        "against_plain": overhead(samples["plain"], samples["steered"], seed=bench.context.options.seed),
    }
