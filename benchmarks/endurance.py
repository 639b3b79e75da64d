"""Endurance: memory after thousands of pauses and sessions, memory beyond weights and KV, waits of predicates.

    python -m benchmarks.endurance --out DIR [--model llama-8b-shape] [--quick]

Levels of memory are read before, after the first tenth, and at the end, always between sessions; what grew after the
first tenth is a leak if it is more than :data:`ALLOWED`.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock, endurance_report, waiting
from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark, main

MIB = 1 << 20

#: Seconds in which a slab that is made ahead of need is done.
SETTLING = 0.2

#: Bytes by which a level may be higher at the end than after the first tenth. Allocators take segments and slabs as a
#: whole, and how many copies are in flight at a time is a matter of chance; a leak of 4 KiB a cycle is more than this.
#: What the whole device has in use is shown, but other processes have their part in it.
ALLOWED = {
    "device_allocated": 2 * MIB,
    "device_reserved": 32 * MIB,
    "pinned_used": 0,
    "pinned_capacity": 128 * MIB,
    "rss": 32 * MIB,
}

#: Most device memory that is asked for beyond weights and KV arena, for the 8B shape.
LIMIT = 3 << 29

#: Tokens of a short prompt.
SHORT = 16


@dataclass
class Bench:
    """What the parts share.

    Attributes:
        context: the run.
        loaded: the model.
        dj: compiled.
        prompt: tokens; its beginning serves as a short prompt.
        room: positions of a session.
        site: where runs stop.
        at_start: bytes of the device in use before the model was there.
    """

    context: Context
    loaded: Loaded
    dj: djinn.Dj
    prompt: list[int]
    room: int
    site: str
    at_start: int

    @property
    def every_token(self) -> Any:
        """A breakpoint at each generated token."""
        return djinn.break_at(self.site, positions="generated")

    def levels(self) -> dict[str, int]:
        """What is in use now, by kind."""
        device = self.loaded.device
        gc.collect()
        clock.synchronize(device)
        time.sleep(SETTLING)
        memory = self.dj.memory()
        found = {name: memory[name] for name in ("pinned_used", "pinned_capacity")}
        if device.type == "cuda":
            found["device_allocated"] = int(torch.cuda.memory_allocated(device))
            found["device_reserved"] = int(torch.cuda.memory_reserved(device))
            found["device_used"] = clock.device_used(device)
            return {**found, "rss": clock.resident() - memory["pinned_capacity"]}
        return {**found, "rss": clock.resident()}  # slabs that nobody wrote to are not resident


def run(context: Context) -> dict[str, Json]:
    """Every part; those that a reader decides by soonest come first."""
    cuda = context.device.type == "cuda"
    if cuda:
        torch.zeros(1, device=context.device)  # the context is there from here on
    at_start = clock.device_used(context.device)
    loaded = context.load()
    clock.clear(context.device)
    room = min(loaded.room, 1024)
    length = min(512, room // 2) if cuda else min(32, room // 4)
    prompt = loaded.prompts(1, length, context.options.seed)[0].tolist()
    dj = context.compile(loaded, max_sessions=4, max_length=room)
    context.say(str(dj.receipt))
    bench = Bench(context, loaded, dj, prompt, room, f"resid_post.{loaded.layers // 2}", at_start)
    quick = context.options.quick
    cycles, lives = (80, 20) if quick and not cuda else (200, 50) if quick or not cuda else (10_000, 1_000)
    parts: dict[str, Callable[[], Json]] = {
        "memory": lambda: memory(bench),
        "lifetimes": lambda: lifetimes(bench, lives),
        "waits": lambda: waiting.run(bench),
        "cycles": lambda: pauses(bench, cycles),
    }
    try:
        return {"room": room, "prompt": length, **{name: context.part(name, part) for name, part in parts.items()}}
    finally:
        dj.close()


def memory(bench: Bench) -> dict[str, Json]:
    """Device memory beyond weights and KV arena, after prompts, decoding, a stop and a checkpoint."""
    device = bench.loaded.device
    bench.dj.warmup()
    with bench.dj.session() as session:
        session.generate(bench.prompt, max_new_tokens=8).run_to_end()
        stopped = session.generate(None, max_new_tokens=4, breakpoints=[bench.every_token])
        taken = next(stopped).checkpoint().wait()
        levels, parts = bench.levels(), dict(bench.dj.memory())
        parts["checkpoint_host"] = taken.nbytes
        stopped.close()
    found: dict[str, Json] = {"components": parts, "levels": levels, "asked_bytes": LIMIT}
    if device.type != "cuda":
        return {**found, "beyond_bytes": None}
    ours = parts["weights"] + parts["kv"]
    torch.cuda.empty_cache()
    trimmed = clock.device_used(device) - ours
    beyond = levels["device_used"] - ours
    parts["device: context, kernels, graphs, other processes"] = levels["device_used"] - levels["device_reserved"]
    parts["... of it before the model was there"] = bench.at_start
    parts["device: kept by torch's allocator, unused"] = levels["device_reserved"] - levels["device_allocated"]
    parts["device: tensors beyond weights and KV"] = levels["device_allocated"] - ours
    held = beyond < LIMIT
    bench.context.say(f"beyond weights and KV: {beyond / MIB:.0f} MiB, {trimmed / MIB:.0f} MiB after empty_cache")
    return {**found, "beyond_bytes": beyond, "beyond_trimmed_bytes": trimmed, "held": held}


def lifetimes(bench: Bench, asked: int) -> dict[str, Json]:
    """Sessions from open to close: a short prompt, two tokens, a fork at a stop, offload and return."""
    expected = _tokens(bench, 3)
    wrong: list[int] = []

    def live(index: int) -> int:
        for turn in range(10):
            if not _life(bench, expected):
                wrong.append(10 * index + turn)
        return 10

    found = _watched(bench, "session lifetimes", asked, live)
    bench.context.check("every session gave the tokens of an undisturbed one", not wrong, f"{len(wrong)} wrong")
    return found


def _life(bench: Bench, expected: list[int]) -> bool:
    """One session; whether it and its fork gave the right tokens."""
    with bench.dj.session() as session:
        run = session.generate(bench.prompt[:SHORT], max_new_tokens=2, breakpoints=[bench.every_token])
        (twin,) = next(run).fork()
        bench.dj.results([run, twin.run])
        session.offload()
        session.generate(None, max_new_tokens=1).run_to_end()  # it comes back by itself
        found = session.tokens[SHORT:].tolist(), twin.session.tokens[SHORT:].tolist()
    return found == (expected, expected[:2])


def pauses(bench: Bench, asked: int) -> dict[str, Json]:
    """Stops at every token, a checkpoint taken and dropped at each; a session is reopened when it is full."""
    each = min(bench.room - SHORT, max(asked // 10, 2))  # the first tenth holds a whole session
    expected = _tokens(bench, each)
    wrong: list[int] = []

    def live(index: int) -> int:
        count = 0
        with bench.dj.session() as session:
            run = session.generate(bench.prompt[:SHORT], max_new_tokens=each, breakpoints=[bench.every_token])
            for stop in run:
                stop.checkpoint()
                count += 1
            if session.tokens[SHORT:].tolist() != expected:
                wrong.append(index)
        return count

    found = _watched(bench, "pause, checkpoint, resume", asked, live)
    bench.context.check("stopped at every token = uninterrupted", not wrong, f"{len(wrong)} sessions wrong")
    return {**found, "tokens_per_session": each}


def _tokens(bench: Bench, count: int) -> list[int]:
    """Tokens of an uninterrupted run."""
    with bench.dj.session() as session:
        session.generate(bench.prompt[:SHORT], max_new_tokens=count).run_to_end()
        found: list[int] = session.tokens[SHORT:].tolist()
    return found


def _watched(bench: Bench, name: str, asked: int, live: Callable[[int], int]) -> dict[str, Json]:
    """Do something again and again, each time so often as it says, and see what grew after the first tenth."""
    context = bench.context
    start = time.perf_counter()
    before, settled, done, index = bench.levels(), None, 0, 0
    settled_at = 0
    while done < asked and not context.over:
        done += live(index)
        index += 1
        if settled is None and 10 * done >= asked:
            settled, settled_at = bench.levels(), done
    after = bench.levels()
    found: dict[str, Json] = {"name": name, "asked": asked, "done": done, "settled_at": settled_at}
    found |= {"before": before, "settled": settled, "after": after, "allowed": ALLOWED}
    found["ms_each"] = 1e3 * (time.perf_counter() - start) / max(done, 1)
    if done < asked:
        found["cut"] = f"the budget of {context.options.budget_seconds:g} s was spent after {done} of {asked}"
        context.say(f"{name}: {found['cut']}")
    if settled is None or done == settled_at:
        return {**found, "grew": None}
    found["grew"] = {kind: after[kind] - settled[kind] for kind in after}
    leaks = [f"{kind} by {grown} bytes" for kind, grown in found["grew"].items() if grown > ALLOWED.get(kind, grown)]
    context.check(
        f"{name}: nothing grew in {done - settled_at} after the first {settled_at}", not leaks, ", ".join(leaks)
    )
    return found


BENCHMARK = Benchmark(
    name="endurance",
    run=run,
    tables=endurance_report.tables,
    pictures=lambda record: [],
)

if __name__ == "__main__":
    sys.exit(main("endurance"))
