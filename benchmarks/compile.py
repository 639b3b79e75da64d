"""Compiling: seconds to the first token against depth, cold and warm, beside whole-graph compilation.

    python -m benchmarks.compile --out DIR [--quick] [--depths 32] [--no-peers]

Every figure comes from a process of its own with a cache folder of its own, empty (cold) or left by the process before
(warm). Importing and making the model are not counted. Whole-graph
compilation is the other system here: ``--no-peers`` leaves it out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from djinn_fx.benchmarks import compile_report
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark, main

#: Variables that say where caches lie: Inductor's, Triton's, and whatever follows the user's cache folder.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": "user",
    "DJINN_CACHE_DIR": "djinn",
}

#: What is compiled, as the child knows it.
KINDS = {"djinn": "djinn_fx", "whole": "torch.compile, whole graph"}

#: Seconds after which a child is ended.
PATIENCE = 600.0


def run(context: Context) -> dict[str, Json]:
    """Every depth by every kind, cold and then warm; the shallowest and the deepest first."""
    from djinn_fx.benchmarks import models

    quick, depths = context.options.quick, depths_of(context)
    kinds = KINDS if context.options.peers else {"djinn": KINDS["djinn"]}
    built_in = models.configuration(context.options.model) is not None
    if not built_in:
        context.say(f"{context.options.model} has one depth only")
    rows = []
    for depth in depths if built_in else [None]:
        for kind in kinds:
            if quick and context.device.type == "cpu" and kind == "whole":
                why = "left out of a --quick run on the CPU: compiling takes longer than the rest"
                rows.append({"depth": depth, "kind": kind, "cold": {"skipped": why}, "warm": {"skipped": why}})
                continue
            rows.append({"depth": depth, "kind": kind, **_pair(context, depth, kind)})
    return {"rows": sorted(rows, key=lambda row: (row["kind"], row["depth"] or 0)), "names": kinds}


def depths_of(context: Context) -> list[int]:
    """The depths that were asked for, or those of a run of this size; the telling ones first.

    Raises:
        ValueError: ``--depths`` is no list of whole numbers above 0.
    """
    asked = context.options.depths
    if asked:
        found = [int(word) if word.strip().isdecimal() else 0 for word in asked.split(",")]
        if min(found) < 1:
            raise ValueError(f"--depths {asked}: give numbers of layers, 1 or more, separated by commas.")
        return found
    if context.device.type == "cpu":
        return [4] if context.options.quick else [4, 16, 8]
    return [4, 8] if context.options.quick else [4, 32, 8, 16]


def _pair(context: Context, depth: int | None, kind: str) -> dict[str, Json]:
    """Cold, then warm from what the cold one left."""
    label = f"{KINDS[kind]}, {depth or 'all'} layers"
    with tempfile.TemporaryDirectory() as folder:
        return {
            heat: context.part(f"{label}, {heat}", lambda heat=heat: _child(context, depth, kind, heat, Path(folder)))  # type: ignore[misc]
            for heat in ("cold", "warm")
        }


def _child(context: Context, depth: int | None, kind: str, heat: str, folder: Path) -> dict[str, Json]:
    """One process's seconds."""
    options = context.options
    command = [sys.executable, "-m", "djinn_fx.benchmarks.compile_child", "--kind", kind, "--model", options.model]
    command += ["--device", str(context.device), "--dtype", options.dtype, "--seed", str(options.seed)]
    command += ["--backend", options.backend, "--prompt", str(context.size(512, 32))]
    command += ["--layers", str(depth)] if depth is not None else []
    caches = {name: str(folder / place) for name, place in CACHES.items()}
    done = subprocess.run(
        command, env={**os.environ, **caches}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode:
        context.say(done.stderr.rstrip())
        raise RuntimeError((done.stderr.strip() or f"the child ended with {done.returncode}").splitlines()[-1])
    found: dict[str, Json] = json.loads(done.stdout.splitlines()[-1])
    label = f"{KINDS[kind]}, {depth or 'all'} layers, {heat}"
    check = context.check(f"{label}: first tokens right", found.pop("held"), found.pop("detail"))
    return found if check.held else refused(check)


BENCHMARK = Benchmark(
    name="compile",
    run=run,
    tables=compile_report.tables,
    pictures=compile_report.pictures,
)

if __name__ == "__main__":
    sys.exit(main("compile"))
