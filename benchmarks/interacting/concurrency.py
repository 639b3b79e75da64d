"""Concurrency: A stands in the middle of a forward pass, B runs from start to end, A goes on."""

from __future__ import annotations

import time

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import overhead


def run(bench: Bench) -> dict[str, Json]:
    """Both exact; B's latency alone and during the pause, in turns; memory before, during and after."""
    context = bench.context
    other = bench.loaded.prompts(1, len(bench.prompt), context.options.seed + 7)[0].tolist()
    with bench.dj.session() as session:
        expected = session.forward(other).result().logits.clone()
    memory = _memory(bench, other, expected)
    check = context.check("A, paused and resumed, and B, run meanwhile: both bit for bit as alone", memory.pop("held"))
    samples: dict[str, list[float]] = {"alone": [], "during": []}
    rounds = context.size(60, 3)
    if check.held:
        for turn in range(rounds):
            for name in ("alone", "during") if turn % 2 else ("during", "alone"):
                samples[name].append(1e3 * _b(bench, other, paused=name == "during"))
    found = {name: context.speed(check, lambda name=name: samples[name]) for name in samples}  # type: ignore[misc]
    ratio = overhead(samples["alone"], samples["during"], seed=context.options.seed) if check.held else None
    return {"memory_bytes": memory, "b": found, "during_against_alone": ratio, "exact": check.held}


def _b(bench: Bench, other: list[int], *, paused: bool) -> float:
    """Seconds of B's forward, A paused meanwhile or not there at all."""
    with bench.dj.session() as a, bench.dj.session() as b:
        run_a = None
        if paused:
            run_a, _, _ = bench.to_stop(a, bench.middle)
        taken = clock.seconds(bench.device, lambda: b.forward(other).run_to_end())
        if run_a is not None:
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
