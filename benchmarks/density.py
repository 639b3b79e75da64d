"""Density: many agents that generate and think, all at once, in less KV memory than all of them need.

    python -m benchmarks.density --out DIR [--model llama-8b-shape] [--quick]

Turns arrive by one seeded timetable, whatever the server does; every way of serving gets the same. What is late counts
from the agent's arrival. A way that is still behind a quarter of the window after it has broken down.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from djinn_fx.benchmarks import clock, density_report, moving
from djinn_fx.benchmarks.answers import near_tie, tolerance
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.crowd import SPREAD, Crowd, timetable
from djinn_fx.benchmarks.decode import LARGE
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark, main
from djinn_fx.benchmarks.serving import Bench, Ours, Recomputing, Sizes
from djinn_fx.benchmarks.serving_peers import Offloaded, PerLayer
from djinn_fx.benchmarks.virtual import COPIED, bus_bandwidth

#: Bytes of pinned host memory, at most; so much is taken as is needed.
PINNED = 48 << 30

#: Device memory that stays free of KV rows.
RESERVE = 6 << 30

#: A server that takes one turn at a time is not tried where it would need so many of itself.
HOPELESS = 2.0

#: The shortest mean think time, in seconds.
LEAST = 0.2

#: What is asked at the target: P99 to the first token over that of everything resident; recomputing's over ours.
WITHIN, BETTER = 2.0, 5.0


@dataclass(frozen=True)
class Way:
    """A way of serving.

    Attributes:
        make: makes the server, of the bench, the number of agents, rows of the budget and hints.
        resident: whether every agent has a row.
        hints: whether agents say for how long they go.
        everywhere: whether it is measured at every number of agents; else at the target alone.
        alone: whether it takes one turn at a time.
    """

    make: type[Any]
    resident: bool = False
    hints: bool = False
    everywhere: bool = True
    alone: bool = False


WAYS = {
    "resident": Way(Ours, resident=True),
    "tiers": Way(Ours, hints=True),
    "tiers, no hints": Way(Ours, everywhere=False),
    "recompute": Way(Recomputing),
    "per layer": Way(PerLayer, alone=True),
    "offloaded cache": Way(Offloaded, alone=True),
}


def sizes_of(context: Context, loaded: Loaded) -> Sizes:
    """Sizes for this device and this model."""
    if context.device.type != "cuda":
        counts = (2, 5) if context.options.quick else (4, 8, 16)
        think = _think(loaded, 2, counts[-1])
        window, pairs, room = context.size(3, 1) * think, context.size(12, 3), min(loaded.room, 128)
        return Sizes(
            counts, counts[-1], counts[-1] // 2, 2, 1, 24, 2, think, window, room, 3, pairs, context.size(8, 4)
        )
    if loaded.weight_bytes > LARGE:
        counts = (10, 80) if context.options.quick else (10, 80, 160)
        return Sizes(counts, 80, 16, 8, 4, 960, 16, 8.0, context.size(10, 5), 1152, pairs=20, block=24)
    small = (10, 80) if context.options.quick else (10, 40, 80, 160, 320)
    room = min(loaded.room, 1024)
    return Sizes(small, 80, 16, 8, 4, room - 128, 16, 2.0, context.size(5, 3), room, block=64)


def _think(loaded: Loaded, new: int, agents: int) -> float:
    """A mean think time, in seconds, at which so many agents keep the eager model busy for half of the time."""
    text = loaded.prompts(1, 1, 0)
    step = min(clock.seconds(loaded.device, lambda: loaded.model(input_ids=text)) for _ in range(3))
    return max(LEAST, agents * new * step / 0.5)


def run(context: Context) -> dict[str, Json]:
    """Moves change no bit; what they cost others; every way at every number of agents."""
    loaded = context.load()
    sizes = sizes_of(context, loaded)
    most = max(sizes.counts)
    prompts = loaded.prompts(most, sizes.prompt, context.options.seed)
    allowed = tolerance(loaded, prompts[:2])
    clock.clear(context.device)
    seats = _seats(loaded, sizes)
    dj = context.compile(loaded, max_sessions=seats, max_length=sizes.room, pinned_bytes=PINNED, edit_rank=1)
    bench = Bench(context, loaded, dj, seats, sizes, prompts.tolist())
    found: dict[str, Json] = {"sizes": asdict(sizes), "seats": seats, "tolerance": allowed, "ways": {}}
    try:
        found["row_bytes"] = dj.memory()["kv"] // (seats + 1)
        found["warm_up"] = context.part("programs", partial(_warm, bench))
        same, detail = moving.same_when_moved(bench)
        check = context.check("a session that moves = one that stays", same, detail)
        # The target comes first: with a short budget there is at least that.
        for count in sorted(sizes.counts, key=lambda count: (count != sizes.target, count)):
            for name in WAYS:
                cell = Cell(bench, name, count, allowed, found["ways"].setdefault(name, {}))
                cell.add()
            if count == sizes.target:
                bandwidth = bus_bandwidth(context.device, min(COPIED, loaded.weight_bytes))
                work = partial(moving.others, bench, bandwidth)
                found["others"] = context.part("what moves cost others", work) if check.held else refused(check)
        for cells in found["ways"].values():
            cells.update({count: cells.pop(count) for count in sorted(cells, key=int)})
    finally:
        dj.close()
    found["targets"] = targets(found["ways"], str(sizes.target))
    return found


def _seats(loaded: Loaded, sizes: Sizes) -> int:
    """KV rows of the device: one for each agent, or as many as fit."""
    most = max(sizes.counts)
    if loaded.device.type != "cuda":
        return most
    heads, width = loaded.kv_shape
    row = 2 * loaded.layers * heads * width * next(loaded.model.parameters()).element_size() * (sizes.room + 1)
    free = torch.cuda.mem_get_info(loaded.device)[0] - RESERVE
    return max(sizes.rows, min(most, int(free // row) - 1))


def _warm(bench: Bench) -> Json:
    """Make every program that the ways run, so that none is made while agents wait."""
    sizes, dj = bench.sizes, bench.dj
    batch = sizes.batch
    while batch:
        prompts = bench.prompts[:batch]
        dj.generate(prompts, max_new_tokens=2 * sizes.slice)
        batch //= 2
    dj.warmup()
    for turns in range(1, min(sizes.turns, 2 + int(sizes.window / sizes.think / (1 - SPREAD)))):
        with dj.session() as session:
            text = (bench.prompts[0] * 2)[: sizes.prompt + turns * sizes.new]
            session.generate(text, max_new_tokens=1).run_to_end()  # as long as what is recomputed
    return {"memory": dict(dj.memory())}


@dataclass
class Cell:
    """One way at one number of agents.

    Attributes:
        bench: what all share.
        name: of the way.
        count: agents.
        allowed: the tolerance.
        others: the same way at other numbers of agents.
    """

    bench: Bench
    name: str
    count: int
    allowed: float
    others: dict[str, Json]

    def add(self) -> None:
        """Measure it, or say why not."""
        way = WAYS[self.name]
        if not way.everywhere and self.count != self.bench.sizes.target:
            return
        why = self._why_not(way)
        title = f"{self.name}, {self.count} agents"
        self.others[str(self.count)] = why or self.bench.context.part(title, partial(self._measure, way))

    def _why_not(self, way: Way) -> Json:
        unsupported = getattr(way.make, "unsupported", lambda device: None)(self.bench.loaded.device)
        if unsupported is not None:
            return {"unsupported": unsupported}
        if not self.bench.context.options.peers and way.alone:
            return {"skipped": "--no-peers"}
        if way.resident and self.count > self.bench.seats:
            return {"broke": f"{self.count} sessions do not fit into {self.bench.seats} rows of device memory"}
        if way.make is Recomputing and len(self.bench.openings) < self.count:
            return {"skipped": "it begins where sessions that stay were, and none were here"}
        for count, cell in self.others.items():
            if int(count) > self.count:
                continue
            if "broke" in cell:
                return {"broke": f"it broke at {count}"}
            needed = cell.get("busy", 0.0) * self.count / int(count)
            if way.alone and needed > HOPELESS:
                busy = f"busy for {100 * cell['busy']:.0f} % of the time at {count}"
                return {"broke": f"one turn at a time: {busy}, so here {needed:.1f} of it would be needed"}
        return None

    def _measure(self, way: Way) -> Json:
        bench, sizes = self.bench, self.bench.sizes
        server = way.make(bench, self.count, bench.seats if way.resident else sizes.rows, way.hints)
        try:
            turns = timetable(self.count, sizes.think, sizes.window, sizes.turns, bench.context.options.seed)
            crowd = Crowd(turns, sizes.new, sizes.window)
            clock.synchronize(bench.loaded.device)
            before = dict(bench.dj.memory())
            with _undisturbed():
                server.serve(crowd)
            openings = getattr(server, "openings", bench.openings)
            after = dict(bench.dj.memory())
            firsts, wholes = crowd.waits()
        finally:
            server.close()
        held, detail = self._judge(crowd, openings)
        check = bench.context.check(f"{self.name}, {self.count} agents: the most likely tokens", held, detail)
        if not held:
            return refused(check)
        found: dict[str, Json] = {
            "first_ms": _quantiles(firsts),
            "turn_ms": _quantiles(wholes),
            "turns": len(crowd.turns),
            "unserved": crowd.unserved,
            "busy": crowd.busy_share,
            "host_bytes": before["host"],
            "pinned_bytes": {"before": before["pinned_capacity"], "after": after["pinned_capacity"]},
        }
        if crowd.unserved:
            found["broke"] = f"{crowd.unserved} of {len(crowd.turns)} turns were not done in time"
        return found

    def _judge(self, crowd: Crowd, openings: dict[int, list[int]]) -> tuple[bool, str]:
        """Whether what some agents were given is what the eager model holds for most likely, token by token."""
        told = crowd.tokens()
        likeliest = ties = 0
        for agent in sorted(told, key=lambda agent: (-len(told[agent]), agent))[: self.bench.sizes.judged]:
            tokens = [*openings[agent], *told[agent]]
            text = torch.tensor([self.bench.prompts[agent] + tokens], device=self.bench.loaded.device)
            logits = self.bench.loaded.model(input_ids=text, use_cache=False, logits_to_keep=len(tokens) + 1).logits
            for step, (row, token) in enumerate(zip(logits[0, :-1].float(), tokens, strict=True)):
                if int(row.argmax()) == token:
                    likeliest += 1
                elif near_tie(row, int(row.argmax()), token, self.allowed):
                    ties += 1
                else:
                    return False, f"agent {agent} was given another token at step {step}, and it is no tie"
        return likeliest > 0, f"{likeliest} are, {ties} as good as equal"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage is collected meanwhile: a full collection would count as a wait."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def targets(ways: Json, target: str) -> list[Json]:
    """What is asked at the target, and what was found; None where there is no figure."""

    def p99(name: str) -> float | None:
        cell = ways.get(name, {}).get(target, {})
        return None if "first_ms" not in cell else float(cell["first_ms"]["p99"])

    def ratio(above: str, below: str) -> Json:
        over, under = p99(above), p99(below)
        least = "broke" in ways.get(above, {}).get(target, {})
        return {"of": above, "over": below, "ratio": over / under if over and under else None, "at_least": least}

    return [
        {**ratio("tiers", "resident"), "asked": WITHIN, "at_most": True},
        {**ratio("recompute", "tiers"), "asked": BETTER, "at_most": False},
    ]


def _quantiles(seconds: list[float]) -> dict[str, float]:
    values = 1e3 * np.asarray(seconds)
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}


BENCHMARK = Benchmark(name="density", run=run, tables=density_report.tables, pictures=density_report.pictures)

if __name__ == "__main__":
    sys.exit(main("density"))
