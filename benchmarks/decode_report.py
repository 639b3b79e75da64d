"""What a record of ``decode`` shows."""

from __future__ import annotations

from collections.abc import Sequence

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, missing, number

#: Our variants in the order of the table.
OURS = {
    "plain": "plain",
    "scale": "edits (scale) at every layer",
    "varied": "edits (scale) at every layer, other in each row",
    "rank": "rank-2 edits at every layer",
    "capture": "captured at every layer",
    "untouched": "stopped every token at one layer, untouched",
    "edited": "stopped every token at one layer, edited",
}

#: What the peers do, in the order of the table.
THEIRS = {"plain": "plain", "scale": "edits (scale) at every layer", "read": "three layers read to the host"}


def tables(record: Record) -> list[Table]:
    """Milliseconds per token by rows, ours and theirs, and what is over the floor."""
    results = record.results
    rows = [str(count) for count in results["plan"]["rows"]]
    body = [["djinn_fx", OURS[key], *(_ours(results, row, key) for row in rows)] for key in OURS]
    for name, entry in results["peers"].items():
        why = missing(entry)
        if why is not None:
            body.append([name, why, *(["-"] * len(rows))])
            continue
        for key, what in THEIRS.items():
            body.append([name, what, *(figure(_theirs(entry, key, row)) for row in rows)])
    floor = number(results["floor_ms"])
    body.append(["bandwidth floor", "weights read once", *([floor] * len(rows))])
    note = (
        f"Milliseconds per token step, medians; prompts of {results['plan']['prompt']} tokens, blocks of "
        f"{results['plan']['block']} between two synchronisations, host work included. Where one of many rows "
        f"stops, the figure is that of the others. edit_rank {results['plan'].get('edit_rank', 4)}. The floor is the "
        "weights that a step reads over the bandwidth of a "
        f"large copy measured in the same run ({results['bandwidth_bytes_per_second'] / 1e12:.2f} TB/s)."
    )
    heads = [f"{row} row{'s' if row != '1' else ''}" for row in rows]
    return [Table("Milliseconds per token", ["system", "doing", *heads], body, note), _relative(record, rows, heads)]


def combined(records: Sequence[Record]) -> Table:
    """Several models' figures in one table, a column for each model and number of rows."""
    columns = [(record, str(rows)) for record in records for rows in record.results["plan"]["rows"] if rows != 8]
    body = [["djinn_fx", what, *(_ours(r.results, n, key) for r, n in columns)] for key, what in OURS.items()]
    names = list(dict.fromkeys(name for record in records for name in record.results["peers"]))
    for name in names:
        entries = {id(record): record.results["peers"].get(name) for record in records}
        whys = [missing(entry) for entry in entries.values()]
        if all(whys):
            body.append([name, str(whys[0]), *(["-"] * len(columns))])
            continue
        for key, what in THEIRS.items():
            cells = [_theirs(entries[id(r)], key, n) if missing(entries[id(r)]) is None else None for r, n in columns]
            body.append([name, what, *(figure(cell) for cell in cells)])
    body.append(["bandwidth floor", "weights read once", *(number(r.results["floor_ms"]) for r, _ in columns)])
    heads = [f"{record.options['model']}, {rows} row{'s' if rows != '1' else ''}" for record, rows in columns]
    return Table("Milliseconds per token", ["system", "doing", *heads], body)


def pictures(record: Record) -> list[Picture]:
    """One bar per system and variant at one row."""
    results = record.results
    bars: list[tuple[float | str, float]] = []
    for key, what in OURS.items():
        cell = _cell(results, "1", key)
        if missing(cell) is None:
            bars.append((f"djinn_fx\n{what}", cell["median"]))
    others: list[tuple[float | str, float]] = []
    for name, entry in results["peers"].items():
        for key, what in THEIRS.items():
            cell = _theirs(entry, key, "1") if missing(entry) is None else entry
            if missing(cell) is None:
                others.append((f"{name}\n{what}", cell["median"]))
    return [
        Picture(
            name="decode_one_row",
            title=f"Milliseconds per token, one row ({record.options['model']}, {record.environment['device_name']})",
            kind="bars",
            series={"djinn_fx": bars, "others": others},
            x="ms per token",
            floor={f"bandwidth floor: {number(results['floor_ms'])}": results["floor_ms"]},
        )
    ]


def _relative(record: Record, rows: list[str], heads: list[str]) -> Table:
    body = []
    for key, what in OURS.items():
        cells = []
        for row in rows:
            cell, plain = _cell(record.results, row, key), _cell(record.results, row, "plain")
            both = missing(cell) is None and missing(plain) is None
            cells.append(f"{cell['median'] / plain['median']:.3f}" if both else "-")
        body.append([what, *cells])
    return Table("djinn_fx against its own plain decoding", ["doing", *heads], body, "Ratio of medians.")


def _cell(results: Json, row: str, key: str) -> Json:
    ours = results["ours"]
    if "all" in ours:
        return ours["all"]
    entry = ours.get(row)
    return entry if missing(entry) is not None else entry.get(key)


def _ours(results: Json, row: str, key: str) -> str:
    return figure(_cell(results, row, key))


def _theirs(entry: Json, key: str, row: str) -> Json:
    cell = entry.get(key)
    return cell if missing(cell) is not None else cell.get(row)
