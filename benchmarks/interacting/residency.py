"""Residency: the bytes that cross the bus while a run pauses and resumes, counted by the profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.record import Json

#: Kinds of copies that cross the bus, as CUPTI names them.
CROSSING = ("HtoD", "DtoH")


def run(bench: Bench) -> dict[str, Json]:
    """A pause in the prompt and pauses while decoding, each against the same run without pauses."""
    if bench.device.type != "cuda":
        return {"absent": "no bus: on the CPU the KV and the caller share one memory"}
    tokens = 8
    point = djinn.break_at(bench.site(bench.middle), positions="generated")
    acts: dict[str, Callable[[], int]] = {
        "prompt, no pause": lambda: _act(bench, 1, []),
        "prompt, paused at one layer": lambda: _act(bench, 1, [bench.site(bench.middle)]),
        f"{tokens} tokens, no pause": lambda: _act(bench, tokens, []),
        f"{tokens} tokens, paused at every token": lambda: _act(bench, tokens, [point]),
    }
    rows: list[dict[str, Json]] = []
    for name, act in acts.items():
        act()  # what is made once is made here
        copies, kv = _counted(act)
        rows.append({"act": name, **copies, "kv_bytes": kv})
    crossed = [row["HtoD"] + row["DtoH"] for row in rows]
    added = [crossed[1] - crossed[0], crossed[3] - crossed[2]]
    kv = rows[0]["kv_bytes"]
    seen = rows[2]["DtoH"] > 0
    bench.context.check("the profiler saw copies at all", seen)
    held = seen and max(added) < kv / 10
    bench.context.check("pausing and resuming moves no KV over the bus", held, f"{added} bytes added, KV {kv} bytes")
    return {"rows": rows, "added_bytes": added, "kv_bytes": kv, "resident": held}


def _act(bench: Bench, count: int, points: list[object]) -> int:
    """Generate, resuming each stop at once; returns the bytes of KV that the session then holds."""
    with bench.dj.session() as session:
        for _ in session.generate(bench.prompt, max_new_tokens=count, breakpoints=points):
            pass
        bench.sync()
        return int(bench.dj.memory()["kv_used"])


def _counted(act: Callable[[], int]) -> tuple[dict[str, int], int]:
    """Bytes of copies by kind, and what the act returned."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        kv = act()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return bus_bytes(path), kv


def bus_bytes(path: Path) -> dict[str, int]:
    """Bytes and number of copies that crossed the bus, from a trace of the profiler."""
    found = {**dict.fromkeys(CROSSING, 0), "copies": 0}
    for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        if event.get("cat") != "gpu_memcpy":
            continue
        kind = next((kind for kind in CROSSING if kind in event["name"]), None)
        if kind is not None:
            found[kind] += int(event["args"]["bytes"])
            found["copies"] += 1
    return found
