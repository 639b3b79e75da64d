"""Scaling: latency by layer, memory by component, checkpoint bytes by length; what was not exact has no time."""

from __future__ import annotations

import time

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.context import refused
from djinn_fx.benchmarks.forking import LENGTHS, goes_on
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.record import Json


def run(bench: Bench) -> dict[str, Json]:
    """The three curves."""
    return {"by_layer": _by_layer(bench), "memory": _memory(bench), "by_length": _by_length(bench)}


def _by_layer(bench: Bench) -> list[dict[str, Json]]:
    """Milliseconds from the call to the stop, for every layer."""
    found = []
    for layer in range(bench.loaded.layers):
        samples, wrong = [], 0
        for _ in range(bench.context.size(9, 1)):
            with bench.dj.session() as session:
                run, _, taken = bench.to_stop(session, layer)
                samples.append(1e3 * taken)
                wrong += not same_bits(run.result().logits, bench.whole)
        name = f"stopped at layer {layer} and resumed = uninterrupted"
        check = bench.context.check(name, not wrong, f"{wrong} of {len(samples)} wrong" if wrong else "")
        found.append({"layer": layer, **bench.context.speed(check, lambda s=samples: s[1:] or s)})  # type: ignore[misc]
    return found


def _memory(bench: Bench) -> dict[str, Json]:
    """Bytes by component while one session stands at a stop and a checkpoint of it exists."""
    with bench.dj.session() as session:
        run, stop, _ = bench.to_stop(session, bench.middle)
        taken = stop.checkpoint().wait()
        parts = {name: int(nbytes) for name, nbytes in bench.dj.memory().items()}
        parts["stop_value"] = stop.value.nbytes
        parts["checkpoint_host"] = taken.nbytes
        run.close()
    if bench.device.type == "cuda":
        import torch

        parts["device_in_use"] = clock.memory_in_use(bench.device)
        parts["device_reserved"] = int(torch.cuda.memory_reserved(bench.device))
        parts["device_peak"] = int(torch.cuda.max_memory_allocated(bench.device))
    return parts


def _by_length(bench: Bench) -> list[dict[str, Json]]:
    """Bytes of a checkpoint after so many tokens, and how long it takes."""
    found = []
    wanted = LENGTHS if bench.device.type == "cuda" else (16, 32, 64, 128, 256, 512)
    lengths = [n for n in wanted if n + 2 < bench.room] or [len(bench.prompt)]
    prompt = bench.loaded.prompts(1, max(lengths), bench.context.options.seed)[0].tolist()
    for length in lengths:
        with bench.dj.session() as session:
            session.generate(prompt[:length], max_new_tokens=1).run_to_end()
            bench.sync()
            start = time.perf_counter()
            taken = session.checkpoint()
            dispatch = time.perf_counter() - start
            taken.wait()
            safe = time.perf_counter() - start
            held = goes_on(bench.dj, session, taken)
        check = bench.context.check(f"a checkpoint of {length} tokens goes on with the same bits", held)
        times = {"dispatch_ms": 1e3 * dispatch, "safe_ms": 1e3 * safe}
        cells = times if check.held else dict.fromkeys(times, refused(check))
        found.append({"tokens": length, "bytes": taken.nbytes, **cells})
    return found
