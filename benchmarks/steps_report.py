"""What a record of ``steps`` shows."""

from __future__ import annotations

from collections.abc import Sequence

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, missing, number, share

#: The arms in the order of the table.
ORDER = ("whole", "whole again", "plain", "armed", "rank")

#: What no decode step can be faster than, in tables and pictures alike.
FLOOR = "floor: weights and KV read once"


def tables(record: Record) -> list[Table]:
    """A table for each number of rows."""
    return [_table(record, rows, entry) for rows, entry in record.results["rows"].items()]


def _table(record: Record, rows: str, entry: Json) -> Table:
    results = record.results
    title = f"Device time of a decode step, {_in_words(rows)}"
    why = missing(entry)
    if why is not None:
        return Table(title, ["why"], [[why]])
    heads = ["graph", "ms", "p95", "over whole", "95 % interval", "over plain", "95 % interval"]
    body = [_row(results["arms"][name], entry["arms"].get(name)) for name in ORDER]
    floors = [("floor: weights read once", results["floor_ms"]), (FLOOR, entry["floor_with_kv_ms"])]
    body += [[what, number(value), *(["-"] * 5)] for what, value in floors]
    return Table(title, heads, body, _note(results, entry))


def _in_words(rows: str) -> str:
    return f"{rows} row{'s' if rows != '1' else ''}"


def combined(records: Sequence[Record]) -> Table:
    """Several models in one table: each arm's milliseconds, and what it takes over the whole graph."""
    columns = [(record, rows) for record in records for rows in record.results["rows"]]
    heads = ["graph", *(f"{record.options['model']}, {_in_words(rows)}" for record, rows in columns)]
    body = []
    for name in ORDER:
        cells = [record.results["rows"][rows].get("arms", {}).get(name) for record, rows in columns]
        label = columns[0][0].results["arms"][name] if columns else name
        body.append([label, *(_with_ratio(cell) for cell in cells)])
    floors = [record.results["rows"][rows].get("floor_with_kv_ms") for record, rows in columns]
    body.append([FLOOR, *("-" if floor is None else f"{number(floor)} ms" for floor in floors)])
    return Table("Device time of a decode step", heads, body)


def _with_ratio(cell: Json) -> str:
    """A median in milliseconds, and the overhead over the whole graph with half the width of its interval."""
    why = missing(cell)
    if why is not None:
        return why
    ratio = cell.get("against_whole")
    if ratio is None:
        return f"{figure(cell)} ms"
    return f"{figure(cell)} ms ({100 * ratio['overhead']:+.2f} ± {50 * (ratio['high'] - ratio['low']):.2f} %)"


def _row(name: str, cell: Json) -> list[str]:
    why = missing(cell)
    if why is not None:
        return [name, why, *(["-"] * 5)]
    return [name, figure(cell), figure(cell, "p95"), *_ratio(cell, "against_whole"), *_ratio(cell, "against_plain")]


def _ratio(cell: Json, key: str) -> list[str]:
    ratio = cell.get(key)
    if ratio is None:
        return ["-", "-"]
    return [share(ratio["overhead"]), f"{share(ratio['low'])} to {share(ratio['high'])}"]


def _note(results: Json, entry: Json) -> str:
    sizes = results["sizes"]
    bits = {True: "the same bits as plain", False: "within tolerance of plain, other bits", None: "not compared"}
    other = [f"{name} runs as {ran}" for name, ran in entry["ran"].items() if ran != name]
    return (
        f"{sizes['replays']} replays back to back per sample from position {sizes['prompt']} on, arms in turns, "
        f"medians; edit_rank {sizes['edit_rank']}. `whole`: the same captured graph without sites, compiled whole; its "
        f"logits: {bits[entry['whole_bitwise']]}. `whole again` is the control. Bandwidth of the floor: "
        f"{results['bandwidth_bytes_per_second'] / 1e12:.2f} TB/s, a large copy in the same run."
        + "".join(f" {text}." for text in other)
    )


def pictures(record: Record) -> list[Picture]:
    """A bar for each graph, a picture for each number of rows."""
    found = []
    for rows, entry in record.results["rows"].items():
        if missing(entry) is not None:
            continue
        cells = [(record.results["arms"][name], entry["arms"].get(name)) for name in ORDER if name != "whole again"]
        bars: list[tuple[float | str, float]] = [(n, cell["median"]) for n, cell in cells if missing(cell) is None]
        if bars:
            floor = entry["floor_with_kv_ms"]
            found.append(
                Picture(
                    name=f"steps_{rows}",
                    title=f"Device time of a decode step, {_in_words(rows)} ({record.options['model']})",
                    kind="bars",
                    series={"graphs": bars},
                    x="ms",
                    floor={f"{FLOOR}: {number(floor)} ms": floor},
                )
            )
    return found
