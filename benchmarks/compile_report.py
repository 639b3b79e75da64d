"""What a record of ``compile`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, missing


def tables(record: Record) -> list[Table]:
    """Seconds to the first and second token, by depth and kind."""
    names = record.results["names"]
    rows = []
    for row in record.results["rows"]:
        cells = [
            missing(row[heat]) or figure(row[heat][key]) for heat in ("cold", "warm") for key in ("first_s", "second_s")
        ]
        rows.append([names[row["kind"]], str(row["depth"] or "all"), *cells])
    note = (
        "Seconds from the call that compiles; a process and a cache folder each; imports and weights not counted. The "
        "second token is the first decoded one. djinn_fx's include its verification against the eager model."
    )
    heads = ["what", "layers", "cold: first token, s", "second", "warm: first token, s", "second"]
    return [Table("Seconds to the first token", heads, rows, note)]


def pictures(record: Record) -> list[Picture]:
    """Depth against seconds."""
    names = record.results["names"]
    series: dict[str, list[tuple[float | str, float]]] = {}
    for heat in ("cold", "warm"):
        for kind, name in names.items():
            rows = [row for row in record.results["rows"] if row["kind"] == kind and row["depth"]]
            points = [(row["depth"], row[heat]["second_s"]) for row in rows if not missing(row[heat])]
            if points:
                series[f"{name}, {heat}"] = points
    if not series:
        return []
    return [Picture("compile_depth", "Seconds to the second token", "lines", series, "layers", "s")]
