"""What a record of ``endurance`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Table, mebibytes, missing, number, yes

#: Levels in words.
LEVELS = {
    "device_allocated": "device: live tensors",
    "device_reserved": "device: held by torch's allocator",
    "device_used": "device: in use, whoever has it",
    "pinned_used": "pinned: checkpoints and offloaded sessions",
    "pinned_capacity": "pinned: all slabs",
    "rss": "process: resident, pinned slabs not counted",
}


def tables(record: Record) -> list[Table]:
    """Growth, memory beyond weights and KV, and waits."""
    results = record.results
    makers = (("cycles", _growth), ("lifetimes", _growth), ("memory", _memory), ("waits", _waits))
    found: list[Table] = []
    for part, maker in makers:
        why = missing(results[part])
        found.append(Table(part.capitalize(), ["why"], [[why]]) if why else maker(results[part]))
    return found


def _growth(part: Json) -> Table:
    rows = []
    for kind, what in LEVELS.items():
        if kind not in part["after"]:
            continue
        levels = [mebibytes(part[when][kind]) if part[when] else "-" for when in ("before", "settled", "after")]
        verdict = ["-", "-"]
        if part["grew"] is not None and kind in part["grew"]:
            grown = part["grew"][kind]
            verdict = [f"{grown:+,} bytes", yes(grown <= part["allowed"][kind]) if kind in part["allowed"] else "-"]
        allowed = mebibytes(part["allowed"][kind]) if kind in part["allowed"] else "-"
        rows.append([what, *levels, *verdict, allowed])
    heads = ["level", "before", f"after {part['settled_at']:,}", f"after {part['done']:,}"]
    note = f"{part['done']:,} of {part['asked']:,} done, {number(part['ms_each'])} ms each."
    if "cut" in part:
        note += f" Cut short: {part['cut']}."
    title = f"Memory over many times: {part['name']}"
    return Table(title, [*heads, "grew since the first tenth", "held", "allowed"], rows, note)


def _memory(part: Json) -> Table:
    rows = [[name.replace("_", " "), mebibytes(nbytes)] for name, nbytes in part["components"].items()]
    note = "After prompts, decoding, a stop and a checkpoint."
    if part["beyond_bytes"] is not None:
        rows += [
            ["**beyond weights and KV arena**", mebibytes(part["beyond_bytes"])],
            ["the same after torch.cuda.empty_cache()", mebibytes(part["beyond_trimmed_bytes"])],
        ]
        note += (
            f" Beyond: what of the device is in use, the CUDA context included, less weights and arena; asked for the "
            f"8B shape: under {mebibytes(part['asked_bytes'])}. Held here: {yes(part['held'])}."
        )
    return Table("Memory beyond weights and KV", ["component", "size"], rows, note)


def _waits(part: Json) -> Table:
    rows = []
    for row in part["rows"]:
        kinds = ", ".join(f"{k} {number(v)}" for k, v in sorted(row["per_step"].items()) if k != "waited" and v)
        figures = [row["calls"], row["waited"], row["added"], row["added_waits"]]
        rows.append([row["act"], *(number(round(value, 3)) for value in figures), kinds or "-"])
    heads = ["while decoding", "calls per step", "of them waited", "calls added", "waits added", "which"]
    note = (
        f"Calls per step that return when the device has done something, from a trace of {part['steps']} steps of one "
        f"row; one waited if it took {part['waited_us']:g} us or more. Asked: none added."
    )
    return Table("Waiting for the device", heads, rows, note)
