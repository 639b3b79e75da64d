"""Checkpoints: ways to bring many tensors into host memory, bytes against time, alone and while a decode runs.

    python -m benchmarks.checkpoint --out DIR [--quick]

The tensors are those of a session: keys and values of every layer, prefixes of longer rows, hence strided. One way is
what checkpoints do with a row; the others know nothing of rows, the general packing kernel among them. On CUDA the
copies go on a stream of their own into pinned memory; while a decode runs, one is begun after every fourth token, and
both sides are timed. Beside them: the general packing kernel against a copy on the device, checkpoints of sessions
between runs and at a stop, forks, and one activation on its way back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from djinn_fx.benchmarks import checkpoint_report, clock, forking
from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.copying import Copying, Way, ways
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark, main
from djinn_fx.benchmarks.stats import overhead, rotated, summary
from djinn_fx.kernels import pack as packing

#: A copy is begun after every so many tokens.
EVERY = 4


def run(context: Context) -> dict[str, Json]:
    """The curves, the same under load, and checkpoints of sessions."""
    loaded = context.load()
    full = context.device.type == "cuda"
    sizes = (1, 4, 16, 64, 256) if full and not context.options.quick else (1, 4, 16) if full else (1, 4)
    found: dict[str, Json] = {
        "sizes_mib": list(sizes),
        "bandwidth_bytes_per_second": clock.read_bandwidth(context.device),
        "alone": context.part("copies alone", lambda: [_alone(context, loaded, size) for size in sizes]),
    }
    length = min(512, loaded.room // 2) if full else min(32, loaded.room // 4)
    prompt = loaded.prompts(1, length, context.options.seed)[0].tolist()
    room = min(loaded.room, 2 * length + 128)
    # Answers are compared with the same model's undisturbed ones, so it is not verified once more.
    dj = context.compile(loaded, max_sessions=4, max_length=room, verify=False)
    try:
        found["sessions"] = context.part("checkpoints of sessions", lambda: _sessions(context, loaded, dj, room))
        found["at_stop"] = context.part("checkpoints at a stop", lambda: forking.at_stop(context, loaded, dj, prompt))
        found["activation"] = context.part("an activation back", lambda: forking.activation_back(context))
        found["forks"] = context.part("forks", lambda: forking.forks(context, loaded, dj, room))
        under = [size for size in sizes if size in (1, 16, 64)]
        found["under_load"] = context.part(
            "copies while a decode runs", lambda: [_under_load(context, loaded, dj, prompt, size) for size in under]
        )
    finally:
        dj.close()
    return found


def _alone(context: Context, loaded: Loaded, mib: int) -> dict[str, Json]:
    """Every way at one size: time until the call returns, until all is on the host, and gigabytes per second."""
    copying = Copying.like(loaded, mib << 20)
    repeats = context.size(20, 4)
    found: dict[str, Json] = {"mib": mib, "bytes": copying.nbytes, "tensors": len(copying.tensors), "ways": {}}
    found["pack"] = _packed(context, copying, repeats)
    for way in ways(copying):
        if way.absent is not None:
            found["ways"][way.name] = {"absent": way.absent}
            continue
        copying.spoil()
        way.copy()
        copying.finish()
        check = context.check(f"{way.name}, {mib} MiB: every byte arrived", way.arrived())
        if not check.held:
            found["ways"][way.name] = {"refused": "wrong result: other bytes"}
            continue
        dispatch, whole = _times(copying, way, repeats)
        cells = {"dispatch": summary(dispatch, "ms"), "whole": summary(whole, "ms")}
        found["ways"][way.name] = {**cells, "gb_per_second": copying.nbytes / cells["whole"]["median"] / 1e6}
    return found


def _packed(context: Context, copying: Copying, repeats: int) -> dict[str, Json]:
    """The packing alone, on the device, against a copy of as many contiguous bytes there."""
    device, staging = copying.device, copying.staging

    def times(call: Callable[[], object]) -> list[float]:
        return [1e3 * clock.device_seconds(device, call) for _ in range(repeats + 2)][2:]

    pack = summary(times(lambda: packing.pack(copying.tensors, staging)), "ms")
    copy = summary(times(lambda: staging.copy_(copying.flat)), "ms")
    return {"pack": pack, "copy": copy, "share_of_copy": copy["median"] / pack["median"]}


def _times(copying: Copying, way: Way, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds until the call returns, and until all is on the host."""
    dispatch, whole = [], []
    for _ in range(repeats + 2):
        dispatch.append(1e3 * clock.dispatch_seconds(copying.device, way.copy))
        copying.finish()
        whole.append(1e3 * clock.seconds(copying.device, way.copy))
    return dispatch[2:], whole[2:]


def _sessions(context: Context, loaded: Loaded, dj: Any, room: int) -> list[dict[str, Json]]:
    """``session.checkpoint()`` by length."""
    lengths = [n for n in (forking.LENGTHS if context.device.type == "cuda" else (16, 64)) if n + 2 < room]
    prompt = loaded.prompts(1, max(lengths), context.options.seed)[0].tolist()
    found = []
    for length in lengths:
        dispatch, whole = [], []
        with dj.session() as session:
            session.generate(prompt[:length], max_new_tokens=1).run_to_end()
            for _ in range(context.size(20, 3) + 1):
                dispatch.append(1e3 * clock.dispatch_seconds(context.device, session.checkpoint))
                whole.append(1e3 * clock.seconds(context.device, lambda: session.checkpoint().wait()))
            taken = session.checkpoint().wait()
            nbytes, held = taken.nbytes, forking.goes_on(dj, session, taken)
        check = context.check(f"a checkpoint of {length} tokens goes on with the same bits", held)
        cells = {
            name: context.speed(check, lambda samples=samples: samples[1:])  # type: ignore[misc]
            for name, samples in (("dispatch", dispatch), ("whole", whole))
        }
        found.append({"tokens": length, "bytes": nbytes, **cells})
    return found


def _under_load(context: Context, loaded: Loaded, dj: Any, prompt: list[int], mib: int) -> dict[str, Json]:
    """Every way at one size while a session decodes: the decode's milliseconds per token, and the copies' own."""
    copying = Copying.like(loaded, mib << 20)
    count, rounds = context.size(48, 8), context.size(8, 2)
    known = [way for way in ways(copying) if way.absent is None]
    with dj.session() as session:
        session.generate(prompt, max_new_tokens=1).run_to_end()
        expected = session.generate(None, max_new_tokens=count).result().tokens
    samples: dict[str, list[float]] = {name: [] for name in ("no copies", *(way.name for way in known))}
    copies: dict[str, list[float]] = {way.name: [] for way in known}
    wrong: set[str] = set()
    for turn in range(rounds):
        order: list[Way | None] = [None, *known]
        for way in rotated(order, turn):
            name = "no copies" if way is None else way.name
            taken, tokens, own = _decode(context, dj, prompt, count, copying, way)
            samples[name].append(1e3 * taken / count)
            copies.get(name, []).extend(own)
            arrived = way is None or way.arrived()
            if not torch.equal(tokens, expected) or not arrived:
                wrong.add(name)
    context.check(f"tokens and bytes right while both run, {mib} MiB", not wrong, ", ".join(sorted(wrong)))
    found: dict[str, Json] = {"mib": mib, "every_tokens": EVERY, "decode": {}, "copies": {}}
    for name, values in samples.items():
        if name in wrong or "no copies" in wrong:
            found["decode"][name] = {"refused": "wrong result: other tokens or bytes"}
            continue
        ratio = overhead(samples["no copies"], values, seed=context.options.seed)
        found["decode"][name] = {**summary(values, "ms"), "against_none": ratio}
        if copies.get(name):
            found["copies"][name] = summary(copies[name], "ms")
    return found


def _decode(
    context: Context, dj: Any, prompt: list[int], count: int, copying: Copying, way: Way | None
) -> tuple[float, torch.Tensor, list[float]]:
    """Seconds and tokens of a decode that begins a copy after every few tokens, and the copies' milliseconds."""
    own: list[float] = []
    seen = 0

    def told(token: int) -> None:
        nonlocal seen
        seen += 1
        if way is not None and seen % EVERY == 0:
            copying.begin(way, own)

    copying.spoil()
    with dj.session() as session:
        session.generate(prompt, max_new_tokens=1).run_to_end()
        run = session.generate(None, max_new_tokens=count, on_token=told)
        taken = clock.seconds(context.device, run.run_to_end)
        copying.collect(own)
        return taken, run.tokens, own


BENCHMARK = Benchmark(
    name="checkpoint",
    run=run,
    tables=checkpoint_report.tables,
    pictures=checkpoint_report.pictures,
)

if __name__ == "__main__":
    sys.exit(main("checkpoint"))
