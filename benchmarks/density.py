"""Density: many agents that generate and think in turns, in less KV memory than all of them need.

    python -m benchmarks.density --out DIR [--model llama-8b-shape] [--quick]

Think time is simulated: turns come in a seeded order, one agent at a time, and every agent is away between its turns.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from djinn_fx.benchmarks import clock, density_report
from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark, main
from djinn_fx.benchmarks.stats import overhead

#: Rows of the KV budget.
ROWS = 8


@dataclass
class Bench:
    """What the ways share: the model, each agent's prompt, tokens per turn, turns and positions per session."""

    context: Context
    loaded: Loaded
    prompts: list[list[int]]
    new: int
    turns: int
    room: int
    most: int
    compiled: dict[int, Any] = field(default_factory=dict)

    def dj(self, rows: int) -> Any:
        """The model compiled for so many rows, once."""
        if rows not in self.compiled:
            made = self.context.compile(self.loaded, max_sessions=rows, max_length=self.room, pinned_bytes=32 << 30)
            made.warmup()
            self.compiled[rows] = made
        return self.compiled[rows]

    def order(self, agents: int) -> list[int]:
        """Who is next, turn after turn: every agent once a round, in a seeded order."""
        chance, found = random.Random(self.context.options.seed), []
        for _ in range(self.turns):
            found += chance.sample(range(agents), agents)
        return found


class Ours:
    """Sessions of one compiled model, of which ``rows`` are on the device at a time."""

    def __init__(self, bench: Bench, agents: int, rows: int) -> None:
        self.bench = bench
        self.dj = bench.dj(rows)
        self.sessions = [self.dj.session(seed) for seed in range(agents)]

    def turn(self, agent: int, first: Callable[[], object]) -> list[int]:
        """One turn; ``first`` is called when its first token is there."""
        session = self.sessions[agent]
        told: list[int] = []

        def hear(token: int) -> None:
            if not told:
                first()
            told.append(token)

        inputs = None if session.length else self.bench.prompts[agent]
        session.generate(inputs, max_new_tokens=self.bench.new, on_token=hear).run_to_end()
        return told

    def close(self) -> None:
        """Close the sessions."""
        for session in self.sessions:
            session.close()


class Recomputing(Ours):
    """A stateless server: every turn takes the whole history as its prompt, on a fresh session."""

    def __init__(self, bench: Bench, agents: int, rows: int) -> None:
        super().__init__(bench, 0, rows)
        self.histories = [list(bench.prompts[agent]) for agent in range(agents)]

    def turn(self, agent: int, first: Callable[[], object]) -> list[int]:
        """See :meth:`Ours.turn`."""
        with self.dj.session() as session:
            told: list[int] = []

            def hear(token: int) -> None:
                if not told:
                    first()
                told.append(token)

            session.generate(self.histories[agent], max_new_tokens=self.bench.new, on_token=hear).run_to_end()
        self.histories[agent] += told
        return told


class PerLayer:
    """Hugging Face's own loop; each agent's cache lies in host memory, and each layer's KV is copied in and out.

    The copies are made here, a layer at a time, as ``OffloadedCache`` makes them between layers: keys and values to
    pinned memory after a turn, back before the next.
    """

    def __init__(self, bench: Bench, agents: int, rows: int) -> None:
        self.bench, self.model = bench, bench.loaded.model
        self.kept: list[list[tuple[torch.Tensor, torch.Tensor]] | None] = [None] * agents
        self.last: list[list[int]] = [list(bench.prompts[agent]) for agent in range(agents)]

    def turn(self, agent: int, first: Callable[[], object]) -> list[int]:
        """See :meth:`Ours.turn`."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        device = self.bench.loaded.device
        told: list[int] = []
        for layer, (keys, values) in enumerate(self.kept[agent] or ()):
            cache.update(keys.to(device, non_blocking=True), values.to(device, non_blocking=True), layer)
        tokens = self.last[agent]
        while len(told) < self.bench.new:
            out = self.model(torch.tensor([tokens], device=device), past_key_values=cache, logits_to_keep=1)
            tokens = [int(out.logits[0, -1].argmax())]
            if not told:
                first()
            told += tokens
        self.last[agent] = tokens
        self.kept[agent] = [(_host(layer.keys), _host(layer.values)) for layer in cache.layers]
        return told

    def close(self) -> None:
        """Drop the caches."""
        self.kept = []


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned for a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


#: The ways: what makes one, and how many rows it has for so many agents; 0: as many as agents.
WAYS: dict[str, tuple[type[Any], int]] = {
    "tiers": (Ours, ROWS),
    "resident": (Ours, 0),
    "recompute": (Recomputing, ROWS),
    "per layer": (PerLayer, ROWS),
}


def run(context: Context) -> dict[str, Json]:
    """Every way at every number of agents, then what moves cost those who decode."""
    counts = (4, 12) if context.options.quick else (10, 20, 40, 80, 160)
    loaded = context.load()
    room = min(loaded.room, 128 if context.options.quick else 1024)
    new, turns = context.size(16, 4), context.size(4, 3)
    length = room // 2
    prompts = [row.tolist() for row in loaded.prompts(max(counts), length, context.options.seed)]
    bench = Bench(context, loaded, prompts, new, turns, room, max(counts))
    found: dict[str, Json] = {"rows": ROWS, "prompt": length, "new": new, "turns": turns, "room": room, "ways": {}}
    truth: dict[int, list[int]] = {}
    for count in counts:
        for way in ("resident", *(name for name in WAYS if name != "resident")):
            cell = context.part(f"{way}, {count} agents", partial(measure, bench, way, count, truth))
            found["ways"].setdefault(way, {})[str(count)] = cell
    found["others"] = context.part("what moves cost others", lambda: others(bench))
    for dj in bench.compiled.values():
        dj.close()
    return found


def measure(bench: Bench, way: str, agents: int, truth: dict[int, list[int]]) -> Json:
    """Turns of all agents in one way: seconds to the first token and of whole turns, after the first turns."""
    make, rows = WAYS[way]
    try:
        server: Any = make(bench, agents, rows or bench.most)
    except torch.OutOfMemoryError as error:
        return {"skipped": f"it does not fit: {error}"[:200]}
    firsts: list[float] = []
    wholes: list[float] = []
    tokens: dict[int, list[int]] = {agent: [] for agent in range(agents)}
    try:
        for number, agent in enumerate(bench.order(agents)):
            if bench.context.over:
                return {"skipped": "the budget was spent"}
            clock.synchronize(bench.loaded.device)
            begun, at = time.perf_counter(), [0.0]

            def first(at: list[float] = at) -> None:
                at[0] = time.perf_counter()

            tokens[agent] += server.turn(agent, first)
            if number >= agents:  # first turns are prompts in every way
                firsts.append(1e3 * (at[0] - begun))
                wholes.append(1e3 * (time.perf_counter() - begun))
    finally:
        server.close()
    ours = way in ("tiers", "resident")
    for agent, mine in tokens.items():
        truth.setdefault(agent, mine) if way == "resident" else None
    same = sum(tokens[agent] == truth.get(agent) for agent in tokens)
    if way != "resident":
        # Others compute in another order: near ties may fall the other way. Ours may not.
        bench.context.check(f"{way}, {agents} agents: the tokens of everything resident", same == agents,
                            f"{same} of {agents}", expected=ours)  # fmt: skip
    return {"first_ms": _quantiles(firsts), "turn_ms": _quantiles(wholes), "same": same, "turns": len(firsts)}


def others(bench: Bench) -> Json:
    """Milliseconds of a decode step of one session, while paused ones stream in and out beside it, and without."""
    server = Ours(bench, 4, ROWS)
    try:
        for agent in range(4):
            server.turn(agent, lambda: None)
        worker, guests = server.sessions[0], server.sessions[1:]
        worker.pin()
        steps = bench.context.size(64, 8)
        base: list[float] = []
        moved: list[float] = []
        for turn in range(min(steps, (bench.room - worker.length) // 2 - 2)):
            for samples in (base, moved) if turn % 2 else (moved, base):
                if samples is moved:
                    guest = guests[turn % len(guests)]
                    guest.pin()
                    guest.pin(False)
                    guests[(turn + 1) % len(guests)].offload()
                begun = time.perf_counter()
                worker.generate(None, max_new_tokens=1).run_to_end()
                samples.append(1e3 * (time.perf_counter() - begun))
    finally:
        server.close()
    return {**overhead(base, moved, seed=bench.context.options.seed), "asked": 0.03}


def _quantiles(samples: list[float]) -> dict[str, float]:
    values = torch.tensor(samples, dtype=torch.float64)
    return {"p50": float(values.quantile(0.5)), "p99": float(values.quantile(0.99)), "max": float(values.max())}


BENCHMARK = Benchmark(name="density", run=run, tables=density_report.tables, pictures=density_report.pictures)

if __name__ == "__main__":
    sys.exit(main("density"))
