"""Concurrency: A stands in the middle of a forward pass, B runs from start to end, A goes on.

B alone finds the host's caches warm from the B before it; behind A's half of a pass it does not, whether A still stands
there or not. A control tells the two apart: A got as far, and was closed, before B begins.
"""

from __future__ import annotations

import time

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import overhead

#: B without A; while A is paused; after A was paused and closed.
ARMS = ("alone", "during", "after")


def run(bench: Bench) -> dict[str, Json]:
    """Both exact; B's latency alone and during the pause, in turns; memory before, during and after."""
    context = bench.context
    other = bench.loaded.prompts(1, len(bench.prompt), context.options.seed + 7)[0].tolist()
    with bench.dj.session() as session:
        expected = session.forward(other).result().logits.clone()
    memory = _memory(bench, other, expected)
    check = context.check("A, paused and resumed, and B, run meanwhile: both bit for bit as alone", memory.pop("held"))
    samples: dict[str, list[float]] = {name: [] for name in ARMS}
    rounds = context.size(200, 3)
    if check.held:
        for turn in range(rounds):
            for name in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
                samples[name].append(1e3 * _b(bench, other, name))
    found = {name: context.speed(check, lambda name=name: samples[name]) for name in samples}  # type: ignore[misc]
    ratios = {
        f"during_against_{name}": overhead(samples[name], samples["during"], seed=context.options.seed)
        if check.held
        else None
        for name in ("alone", "after")
    }
    return {"memory_bytes": memory, "b": found, **ratios, "exact": check.held}


def _b(bench: Bench, other: list[int], arm: str) -> float:
    """Seconds of B's forward: A not there at all, paused meanwhile, or paused and closed before."""
    with bench.dj.session() as a, bench.dj.session() as b:
        run_a = None if arm == "alone" else bench.to_stop(a, bench.middle)[0]
        if run_a is not None and arm == "after":
            run_a.close()
        taken = clock.seconds(bench.device, lambda: b.forward(other).run_to_end())
        if run_a is not None and arm == "during":
            run_a.close()
    return taken


def _memory(bench: Bench, other: list[int], expected: torch.Tensor) -> dict[str, Json]:
    """Bytes in use before, during and after, and whether both answers were exact."""
    clock.clear(bench.device)
    before = clock.memory_in_use(bench.device)
    with bench.dj.session() as a, bench.dj.session() as b:
        run_a, stop, _ = bench.to_stop(a, bench.middle)
        at_stop = clock.memory_in_use(bench.device)
        logits_b = b.forward(other).result().logits.clone()
        during = clock.memory_in_use(bench.device) - (logits_b.nbytes if logits_b.device.type == "cuda" else 0)
        start = time.perf_counter()
        logits_a = run_a.result().logits.clone()
        bench.sync()
        resumed = time.perf_counter() - start
        held = same_bits(logits_b, expected) and same_bits(logits_a, bench.whole)
        kept = stop.value.nbytes
        del logits_a, logits_b, stop, run_a
    clock.clear(bench.device)
    return {
        "held": held,
        "before": before,
        "a_paused": at_stop,
        "b_done": during,
        "after": clock.memory_in_use(bench.device),
        "activation": kept,
        "a_resumed_ms": 1e3 * resumed if held else None,
        "counted": "live tensors on the device" if bench.device.type == "cuda" else "resident memory of the process",
    }
