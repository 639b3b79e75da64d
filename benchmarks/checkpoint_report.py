"""What a record of ``checkpoint`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, mebibytes, missing, share


def tables(record: Record) -> list[Table]:
    """Ways alone, under load, and sessions."""
    results = record.results
    makers = (("alone", _alone), ("sessions", _sessions), ("under_load", _under_load))
    found: list[Table] = []
    for part, maker in makers:
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
    ]


def _cell(cell: Json, key: str) -> str:
    return missing(cell) or figure(cell[key])


def _sessions(part: Json) -> list[Table]:
    rows = [
        [str(row["tokens"]), mebibytes(row["bytes"]), figure(row["dispatch"]), figure(row["whole"])] for row in part
    ]
    heads = ["tokens", "bytes", "call returns, ms", "safe, ms"]
    return [Table("session.checkpoint()", heads, rows, "Through the public API; medians.")]


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
