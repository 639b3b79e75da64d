"""Interactivity: stop inside a forward pass, look, edit, save, go on; exact, and at what cost.

    python -m benchmarks.interactivity --out DIR [--quick]

Batch 1, a prompt of 512 tokens, breakpoints at layers 3, 6 and 9 with three trials each, then at every layer. The parts
are files of ``interacting/``; each takes the :class:`Bench` below and returns its tree of figures.
"""

from __future__ import annotations

import sys

from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.interacting import (
    comparison,
    concurrency,
    legacy,
    overhead,
    report,
    residency,
    scaling,
    steering,
    stopping,
)
from djinn_fx.benchmarks.interacting.bench import open_bench
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark, main

#: The parts, in order: those that a reader decides by come first, in case the budget is spent.
PARTS = {
    "breakpoints": stopping.breakpoints,
    "checkpoints": stopping.checkpoints,
    "overhead": overhead.run,
    "steering": steering.run,
    "concurrency": concurrency.run,
    "residency": residency.run,
    "scaling": scaling.run,
    "comparison": comparison.run,
}


def run(context: Context) -> dict[str, Json]:
    """Compile once, then each part."""
    bench = open_bench(context)
    found: dict[str, Json] = {"setting": bench.setting()}
    try:
        for name, part in PARTS.items():
            found[name] = context.part(name, lambda part=part: part(bench))  # type: ignore[misc]
    finally:
        bench.dj.close()
    return found


BENCHMARK = Benchmark(
    name="interactivity",
    run=run,
    tables=report.tables,
    pictures=report.pictures,
    extras=legacy.extras,
)

if __name__ == "__main__":
    sys.exit(main("interactivity"))
