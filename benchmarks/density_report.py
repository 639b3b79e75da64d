"""What a record of ``density`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, missing, number, share


def tables(record: Record) -> list[Table]:
    """Turns by way and number of agents; what moves cost others."""
    results = record.results
    rows = []
    for way, cells in results["ways"].items():
        for count, cell in cells.items():
            why = missing(cell)
            if why is not None:
                rows.append([way, count, why, "-", "-", "-", "-"])
                continue
            figures = [cell[part][which] for part in ("first_ms", "turn_ms") for which in ("p50", "p99")]
            rows.append([way, count, *(number(value) for value in figures), f"{cell['same']} of {count}"])
    heads = ["way", "agents", "first token P50 ms", "P99", "turn P50 ms", "P99", "same tokens"]
    note = (
        f"{results['turns']} turns of {results['new']} tokens after a prompt of {results['prompt']}; first turns not "
        f"counted; {results['rows']} KV rows, for `resident` one an agent. Turns come one at a time. `per layer`: "
        "Hugging Face's eager model, the KV of each layer copied to the host and back, as its OffloadedCache does."
    )
    return [Table("Agents in turns", heads, rows, note), _others(results["others"])]


def _others(part: Json) -> Table:
    title, why = "What sessions on the move cost those who decode", missing(part)
    if why is not None:
        return Table(title, ["why"], [[why]])
    row = [share(part["overhead"]), f"{share(part['low'])} to {share(part['high'])}", share(part["asked"])]
    return Table(title, ["step time", "95 % interval", "asked: at most"], [row])


def pictures(record: Record) -> list[Picture]:
    """P99 to the first token over the number of agents, each way until it breaks."""
    series: dict[str, list[tuple[float | str, float]]] = {}
    for way, cells in record.results["ways"].items():
        points: list[tuple[float | str, float]] = [
            (int(count), cell["first_ms"]["p99"]) for count, cell in cells.items() if missing(cell) is None
        ]
        if points:
            series[way] = points
    if not series:
        return []
    title = f"Resume to first token, P99 ({record.options['model']})"
    return [Picture(name="density", title=title, kind="lines", series=series, x="agents", y="ms", log="xy")]
