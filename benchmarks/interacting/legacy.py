"""The two files of the original experiment, by its names, from a record."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import missing

#: The original system's own figures (H100, GPT-2, batch 1, 512 tokens, layers 3, 6, 9, nine trials).
ORIGINAL: dict[str, Json] = {
    "device": "H100",
    "token_accuracy_percent": 100.0,
    "to_stop_ms": [511, 719],
    "first_s": 37.5,
    "checkpoint_dispatch_ms": 0.0,
    "restore_ms": {"mean": 1.33, "min": 0.89, "max": 1.72},
    "overhead_percent": {"mean": 0.19, "max": 0.24},
    "checkpoint_bytes": 2_500_000,
    "steering_tokens_changed_of_512": 2,
    "concurrent_request_ms": 374,
    "memory_gb": [41.32, 41.46],
}


def extras(record: Record) -> dict[str, Json]:
    """``djinn_breakpoint_results.json`` and ``comparative_results.json``."""
    results = record.results
    shared = {"options": record.options, "environment": record.environment, "setting": results["setting"]}
    ours = {part: results[part] for part in ("breakpoints", "checkpoints", "overhead", "steering", "concurrency")}
    comparison = results["comparison"]
    systems = {"absent": missing(comparison)} if missing(comparison) else comparison["systems"]
    return {
        "djinn_breakpoint_results.json": {**shared, **ours, "residency": results["residency"]},
        "comparative_results.json": {**shared, "original_published": ORIGINAL, "systems": systems},
    }
