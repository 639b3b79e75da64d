"""What a record of ``harvest`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, missing, number, share

#: The arms in the order of the table, and what they are called there.
ARMS = {
    "djinn_fx": "djinn_fx, ended behind the last layer",
    "hooks": "Hugging Face eager + forward hooks",
    "hooks, ended": "the same, ended by an exception behind the last layer",
}

#: The same, on the bars of the picture.
BARS = {"djinn_fx": "djinn_fx", "hooks": "forward hooks", "hooks, ended": "forward hooks, ended early"}


def tables(record: Record) -> list[Table]:
    """A table for each choice of layers."""
    return [_table(record.results["sizes"], case, entry) for case, entry in record.results["cases"].items()]


def pictures(record: Record) -> list[Picture]:
    """Tokens per second of each arm, by choice of layers."""
    series: dict[str, list[tuple[float | str, float]]] = {}
    for case, entry in record.results["cases"].items():
        for arm, cell in entry.get("arms", {}).items():
            if missing(cell) is None:
                series.setdefault(arm, []).append((f"{BARS[arm]}\n{case}", cell["tokens_per_second"]))
    if not series:
        return []
    return [Picture("harvest", "Harvesting activations", "bars", series, x="tokens per second")]


def _table(sizes: Json, case: str, entry: Json) -> Table:
    title = f"Harvesting activations of {case}"
    why = missing(entry)
    if why is not None:
        return Table(title, ["why"], [[why]])
    heads = ["system", "tokens per second", "ms per batch", "time over hooks", "95 % interval", "over ended hooks"]
    body = [_row(label, entry["arms"].get(arm)) for arm, label in ARMS.items()]
    note = (
        f"Batches of {sizes['rows']} texts of {sizes['length']} random tokens; the outputs of "
        f"{len(entry['layers'])} blocks are brought to the host. Below 0 % is faster. Values compared first."
    )
    return Table(title, heads, body, note)


def _row(label: str, cell: Json) -> list[str]:
    why = missing(cell)
    if why is not None:
        return [label, why, *(["-"] * 4)]
    ratio, ended = cell.get("against_hooks"), cell.get("against_ended")
    interval = f"{share(ratio['low'])} to {share(ratio['high'])}" if ratio else "-"
    overs = [share(found["overhead"]) if found else "-" for found in (ratio, ended)]
    return [label, number(cell["tokens_per_second"]), figure(cell), overs[0], interval, overs[1]]
