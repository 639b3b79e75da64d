"""How often the host waits for the device while it decodes, from the profiler: with predicates at every layer, without.

A run is traced at two lengths; the difference is what the steps between them took, without what each call takes once.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.record import Json

if TYPE_CHECKING:
    from djinn_fx.benchmarks.endurance import Bench

#: Calls that return when the device has done something.
WAITS = re.compile(
    r"(cuda(Stream|Event|Device)Synchronize|cu(Stream|Event|Ctx)Synchronize|cudaMemcpy|cuMemcpy[DH]to[DH])(_v\d+)?"
)

#: Microseconds from which on such a call did wait: one that finds its event passed returns within a few.
WAITED = 10.0

#: A value that no activation reaches.
NEVER = 1e30


def run(bench: Bench) -> dict[str, Json]:
    """Calls that wait per decode step, nothing armed, then with predicates of both kinds at every layer."""
    if bench.loaded.device.type != "cuda":
        return {"absent": "on the CPU there is no device to wait for"}
    everywhere = "resid_post.*"
    arms: dict[str, list[Any]] = {
        "nothing armed": [],
        "built-in predicate at every layer": [djinn.break_at(everywhere, when=djinn.when.norm_above(NEVER))],
        "predicate of the user's at every layer": [
            djinn.break_at(everywhere, when=lambda value: torch.gt(value.float().abs().amax(), NEVER))
        ],
    }
    short, long = bench.context.size(8, 4), bench.context.size(40, 12)
    rows: list[dict[str, Json]] = []
    for name, points in arms.items():
        first, second = (_traced(bench, points, count) for count in (short, long))
        steps = long - short
        kinds = {kind: (second.get(kind, 0) - first.get(kind, 0)) / steps for kind in {**first, **second}}
        rows.append({"act": name, "per_step": kinds, "calls": _calls(kinds), "waited": kinds.get("waited", 0.0)})
    for row in rows:
        row["added"] = row["calls"] - rows[0]["calls"]
        row["added_waits"] = row["waited"] - rows[0]["waited"]
    bench.context.check("the profiler saw the host wait at all", rows[0]["calls"] > 0)
    return {"rows": rows, "steps": long - short, "asked": 0, "waited_us": WAITED}


def _calls(kinds: dict[str, float]) -> float:
    return sum(count for kind, count in kinds.items() if kind != "waited")


def _traced(bench: Bench, points: list[Any], count: int) -> dict[str, int]:
    """Waiting calls while so many tokens are decoded."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with bench.dj.session() as session:
        session.generate(bench.prompt, max_new_tokens=1).run_to_end()
        _decode(session, points, 4)  # what is made once is made here
        clock.synchronize(bench.loaded.device)
        with torch.profiler.profile(activities=activities) as profile:
            _decode(session, points, count)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return waiting_calls(path)


def _decode(session: djinn.Session, points: list[Any], count: int) -> None:
    stop = next(session.generate(None, max_new_tokens=count, breakpoints=points), None)
    if stop is not None:
        raise RuntimeError(f"a breakpoint that cannot fire did, at {stop.site}")


def waiting_calls(path: Path) -> dict[str, int]:
    """How often each waiting call was made in a profiler's trace, and under ``waited`` how many took their time."""
    found: dict[str, int] = {"waited": 0}
    for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
        if event.get("cat") not in ("cuda_runtime", "cuda_driver") or not WAITS.fullmatch(event["name"]):
            continue
        found[event["name"]] = found.get(event["name"], 0) + 1
        found["waited"] += float(event.get("dur", 0.0)) >= WAITED
    return found
