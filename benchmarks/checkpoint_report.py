"""What a record of ``checkpoint`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, mebibytes, missing, share


def tables(record: Record) -> list[Table]:
    """Ways alone, under load, sessions, and what happens at stops."""
    results = record.results
    makers = (
        ("alone", _alone),
        ("sessions", _sessions),
        ("at_stop", _at_stop),
        ("forks", _forks),
        ("activation", _activation),
        ("under_load", _under_load),
    )
    found: list[Table] = []
    for part, maker in makers:
        if part not in results:  # a record of an earlier version
            continue
        why = missing(results[part])
        found += [Table(part.capitalize(), ["why"], [[why]])] if why else maker(results[part])
    return found


def _alone(part: Json) -> list[Table]:
    heads = ["way", *(f"{entry['mib']} MiB" for entry in part)]
    rows = [[name, *(_cell(entry["ways"][name], "whole") for entry in part)] for name in part[0]["ways"]]
    speed = [[name, *(_cell(entry["ways"][name], "gb_per_second") for entry in part)] for name in part[0]["ways"]]
    dispatch = [[name, *(_cell(entry["ways"][name], "dispatch") for entry in part)] for name in part[0]["ways"]]
    note = f"{part[0]['tensors']} strided tensors; milliseconds until every byte is in host memory, medians."
    return [
        Table("Copies alone", heads, rows, note),
        Table("Copies alone, GB/s", heads, speed),
        Table("Copies alone: the call returns", heads, dispatch, "Milliseconds of host work, medians."),
        *_packed(part, heads),
    ]


def _packed(part: Json, heads: list[str]) -> list[Table]:
    cells = [entry.get("pack") for entry in part]
    if any(missing(cell) for cell in cells):
        return []
    rows = [[what, *(figure(cell[key]) for cell in cells)] for key, what in (("pack", "pack"), ("copy", "copy"))]
    rows.append(["share of the copy's bandwidth", *(f"{100 * cell['share_of_copy']:.0f} %" for cell in cells)])
    note = "Device time of the general packing kernel, and of a copy of as many contiguous bytes there; ms, medians."
    return [Table("Packing on the device", ["what", *heads[1:]], rows, note)]


def _cell(cell: Json, key: str) -> str:
    return missing(cell) or figure(cell[key])


def _sessions(part: Json) -> list[Table]:
    rows = [
        [str(row["tokens"]), mebibytes(row["bytes"]), figure(row["dispatch"]), figure(row["whole"])] for row in part
    ]
    heads = ["tokens", "bytes", "call returns, ms", "safe, ms"]
    return [Table("session.checkpoint()", heads, rows, "Through the public API; medians.")]


def _at_stop(part: Json) -> list[Table]:
    row = [str(part["tokens"]), str(part["layer"]), mebibytes(part["bytes"])]
    note = f"The session stands in its prompt; of the bytes, one activation is {mebibytes(part['activation_bytes'])}. "
    note += "The rest is KV of earlier chunks; that of the chunk where it stands is computed again when it is restored."
    note += " Its driver calls alone: the copy to the host, a packing launch if there is KV, and the events between."
    heads = ["tokens", "layer", "bytes", "call returns, ms", "its driver calls alone, ms", "safe, ms"]
    cells = [figure(part["dispatch"]), figure(part.get("driver_calls", {"absent": "no GPU"})), figure(part["whole"])]
    return [Table("Checkpoint at a stop", heads, [[*row, *cells]], note)]


def _forks(part: Json) -> list[Table]:
    rows = [
        [
            f"fork of {row['tokens']:,} tokens",
            mebibytes(row["bytes"]) if "bytes" in row else "-",
            figure(row["dispatch"]),
            figure(row["whole"]),
        ]
        for row in part
    ]
    note = "stop.fork() while decoding, the device idle before it; medians. Done: the device has copied the KV."
    return [Table("Forks", ["what", "KV", "call returns, ms", "done, ms"], rows, note)]


def _activation(part: Json) -> list[Table]:
    row = [mebibytes(part["bytes"]), figure(part["back"]), figure(part["back"], "p95")]
    note = "From pinned memory to the device and there; as many bytes as the original system's one activation."
    return [Table("An activation back", ["bytes", "ms", "p95"], [row], note)]


def _under_load(part: Json) -> list[Table]:
    found = []
    for entry in part:
        rows = []
        for name, cell in entry["decode"].items():
            why = missing(cell)
            if why:
                rows.append([name, why, "-", "-", "-"])
                continue
            ratio = cell["against_none"]
            interval = f"{share(ratio['low'])} to {share(ratio['high'])}"
            own = entry["copies"].get(name)
            rows.append([name, figure(cell), share(ratio["overhead"]), interval, figure(own) if own else "-"])
        note = (
            f"A copy is begun after every {entry['every_tokens']} tokens unless the last is still on its way. The "
            "decode's milliseconds per token, host work of the copies included, and the copies' own."
        )
        heads = ["way", "decode, ms per token", "slower by", "95 % interval", "copy, ms"]
        found.append(Table(f"While a decode runs: {entry['mib']} MiB", heads, rows, note))
    return found


def pictures(record: Record) -> list[Picture]:
    """Bytes against time."""
    part = record.results["alone"]
    if missing(part):
        return []
    series: dict[str, list[tuple[float | str, float]]] = {}
    for name in part[0]["ways"]:
        cells = [(entry["mib"], entry["ways"][name]) for entry in part]
        points = [(mib, cell["whole"]["median"]) for mib, cell in cells if not missing(cell)]
        if points:
            series[name] = points
    return [Picture("checkpoint_ways", "A session's tensors into host memory", "lines", series, "MiB", "ms", "xy")]
