"""Breakpoints and checkpoints: exact, and how long each takes."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.context import refused
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import summary

#: So many edits at a layer are timed apart on CUDA: the sixteenth makes a graph of what then runs again.
FIRST = 17


def breakpoints(bench: Bench) -> dict[str, Json]:
    """Trials at the original's layers, then one at every layer; edited resumes beside untouched ones."""
    trials = [_trial(bench, layer, trial) for layer in bench.layers for trial in range(bench.trials)]
    rows = [f"layer {row['layer']} trial {row['trial']}" for row in trials if not row["bitwise"]]
    check = bench.context.check(
        f"stopped and resumed = uninterrupted, bit for bit, {len(trials)} trials", not rows, ", ".join(rows)
    )
    every = [_trial(bench, layer, 0) for layer in range(bench.loaded.layers)]
    wrong = [str(row["layer"]) for row in every if not row["bitwise"]]
    all_layers = bench.context.check(
        f"the same at every one of {len(every)} layers", not wrong, f"wrong at {', '.join(wrong)}" if wrong else ""
    )
    repeats = bench.context.size(40, 3)
    return {
        "trials": _without_times(trials, check.held),
        "every_layer": _without_times(every, all_layers.held),
        "token_accuracy": min(row["token_accuracy"] for row in trials + every),
        "bitwise": check.held and all_layers.held,
        "first_ms": bench.first["stop_ms"] if check.held else refused(check),
        "first_with_compile_s": bench.first["with_compile_s"] if check.held else refused(check),
        "warm": {
            str(layer): bench.context.speed(check, lambda layer=layer: _stop_times(bench, layer, repeats))  # type: ignore[misc]
            for layer in bench.layers
        },
        "resume_decode": _resumes(bench, repeats) if check.held else refused(check),
    }


def _trial(bench: Bench, layer: int, trial: int) -> dict[str, Json]:
    """Stop once, go on untouched, compare with the uninterrupted forward."""
    with bench.dj.session() as session:
        run, _, to_stop = bench.to_stop(session, layer)
        start = time.perf_counter()
        logits = run.result().logits
        bench.sync()
        resumed = time.perf_counter() - start
    return {
        "layer": layer,
        "trial": trial,
        "token_accuracy": float((logits.argmax(-1) == bench.whole.argmax(-1)).double().mean()),
        "bitwise": same_bits(logits, bench.whole),
        "to_stop_ms": 1e3 * to_stop,
        "resume_ms": 1e3 * resumed,
    }


def _without_times(rows: list[dict[str, Json]], held: bool) -> list[dict[str, Json]]:
    """The rows; without their times where an answer was wrong."""
    return rows if held else [{k: v for k, v in row.items() if not k.endswith("_ms")} for row in rows]


def _stop_times(bench: Bench, layer: int, repeats: int) -> list[float]:
    """Milliseconds from the call to the stop in hand."""
    found = []
    for _ in range(repeats):
        with bench.dj.session() as session:
            run, _, seconds = bench.to_stop(session, layer)
            found.append(1e3 * seconds)
            run.close()
    return found


def _resumes(bench: Bench, repeats: int) -> dict[str, Json]:
    """While decoding: milliseconds from a stop to the next token, untouched and edited, against a step.

    On CUDA the first edits at a layer run the whole step again, until the graph of its rest is made; they are apart.
    """
    cuda = bench.device.type == "cuda"
    count, first = repeats + 2, bench.context.size(FIRST, 0) if cuda else 0
    edited = {layer: _decode_resumes(bench, layer, count + first, 0.9) for layer in bench.layers}
    found: dict[str, Json] = {
        "step": summary(_token_gaps(bench, count), "ms"),
        "untouched": summary(_decode_resumes(bench, bench.middle, count, None), "ms"),
    }
    if first or not cuda:
        found["edited"] = {str(layer): summary(times[first:], "ms") for layer, times in edited.items()}
    if cuda:
        early = first - 3 if first else count
        found["edited_first"] = summary([time for times in edited.values() for time in times[:early]], "ms")
    return found


def _token_gaps(bench: Bench, count: int) -> list[float]:
    """Milliseconds between tokens of an undisturbed run."""
    stamps: list[float] = []
    with bench.dj.session() as session:
        run = session.generate(
            bench.prompt, max_new_tokens=count, on_token=lambda token: stamps.append(time.perf_counter())
        )
        run.run_to_end()
    return [1e3 * (b - a) for a, b in pairwise(stamps[1:])] or [0.0]


def _decode_resumes(bench: Bench, layer: int, count: int, factor: float | None) -> list[float]:
    """Milliseconds from advancing a stopped run to its token being committed."""
    import djinn_fx as djinn

    stamps: list[float] = []
    found: list[float] = []
    point = djinn.break_at(bench.site(layer), positions="generated")
    with bench.dj.session() as session:
        run = session.generate(
            bench.prompt,
            max_new_tokens=count,
            breakpoints=[point],
            on_token=lambda token: stamps.append(time.perf_counter()),
        )
        advanced: float | None = None
        while (stop := next(run, None)) is not None:
            if advanced is not None:
                found.append(1e3 * (stamps[-1] - advanced))
            if factor is not None:
                stop.value.mul_(factor)
            bench.sync()
            advanced = time.perf_counter()
    return found[1:] or found


def checkpoints(bench: Bench) -> dict[str, Json]:
    """Dispatch, bytes, time until safe, and restoring, trial by trial."""
    context = bench.context
    rows = [_checkpoint(bench, layer, trial) for layer in bench.layers for trial in range(bench.trials)]
    wrong = [f"layer {row['layer']} trial {row['trial']}" for row in rows if not row["bitwise"]]
    check = context.check(f"restored = uninterrupted, bit for bit, {len(rows)} trials", not wrong, ", ".join(wrong))
    repeats = context.size(100, 2)
    with bench.dj.session() as session:
        run, stop, _ = bench.to_stop(session, bench.middle)
        untouched, _ = _checkpoint_times(bench, stop, repeats)
        value = stop.value.clone()
        dispatch, safe = _checkpoint_times(bench, stop, repeats)
        run.close()
    back = _activation_back(bench, value, repeats)
    whole = [] if wrong else [row["restore_ms"] for row in rows]
    return {
        "trials": _without_times(rows, check.held),
        "dispatch": context.speed(check, lambda: dispatch),
        "dispatch_untouched": context.speed(check, lambda: untouched),
        "until_safe": context.speed(check, lambda: safe),
        "restore": context.speed(check, lambda: whole),
        "activation_bytes": value.nbytes,
        "activation_back": context.speed(back.pop("check"), lambda: back["samples"]),
    }


def _checkpoint(bench: Bench, layer: int, trial: int) -> dict[str, Json]:
    """Take one at a stop, restore it into another session, and run that to its end."""
    dj = bench.dj
    with dj.session() as session:
        run, stop, _ = bench.to_stop(session, layer)
        dispatch, taken = _timed(stop.checkpoint)
        start = time.perf_counter()
        taken.wait()
        safe = dispatch + time.perf_counter() - start
        run.close()
    bench.sync()
    start = time.perf_counter()
    with dj.restore(taken) as restored:
        bench.sync()
        back = time.perf_counter() - start
        logits = restored.run.result().logits
    return {
        "layer": layer,
        "trial": trial,
        "bytes": taken.nbytes,
        "bitwise": same_bits(logits, bench.whole),
        "dispatch_ms": 1e3 * dispatch,
        "safe_ms": 1e3 * safe,
        "restore_ms": 1e3 * back,
    }


def _timed(call: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _checkpoint_times(bench: Bench, stop: Any, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds until the call returns, and until everything is in host memory."""
    dispatch, safe = [], []
    for _ in range(repeats):
        bench.sync()
        start = time.perf_counter()
        taken = stop.checkpoint()
        dispatch.append(1e3 * (time.perf_counter() - start))
        taken.wait()
        safe.append(1e3 * (time.perf_counter() - start))
    return dispatch, safe


def _activation_back(bench: Bench, value: torch.Tensor, repeats: int) -> dict[str, Any]:
    """The activation alone from host memory to the device: what the original's figure for restoring is."""
    host = value.cpu()
    host = host.pin_memory() if value.is_cuda else host
    target = torch.empty_like(value)
    samples = [
        1e3 * clock.seconds(bench.device, lambda: target.copy_(host, non_blocking=True)) for _ in range(repeats + 2)
    ]
    held = same_bits(target, value)
    return {"check": bench.context.check("the activation came back bit for bit", held), "samples": samples[2:]}
