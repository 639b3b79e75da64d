"""What a record of ``virtual`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, figure, mebibytes, missing, number


def tables(record: Record) -> list[Table]:
    """Resident, then each budget with ours, the floor and Accelerate; how many times as long Accelerate takes."""
    results = record.results
    plan = results["plan"]
    heads = ["weights", "on the device", "streamed per step", "prompt, ms", "token, ms", "of the bus, prompt", "token"]
    body = [_row("resident", results["resident"])]
    for budget, cells in results["budgets"].items():
        name = mebibytes(int(budget))
        body.append(_row(f"{name}, ours", cells["ours"]))
        if missing(cells["ours"]) is None:
            floor = number(cells["ours"]["floor_ms"])
            body.append([f"{name}, floor: the bus", "-", "-", floor, floor, "-", "-"])
        body.append(_row(f"{name}, accelerate", cells.get("accelerate")))
    note = (
        f"One session, prompt of {plan['prompt']} tokens up to its first token, then milliseconds per token over "
        f"blocks of {plan['block']}; medians. `of the bus`: the floor over the time. Ours is bit for bit what resident "
        f"gives. The bus: {results['bus_bytes_per_second'] / 1e9:.1f} GB/s, one contiguous copy from pinned memory in "
        "the same run."
    )
    return [Table("A model larger than the memory for its weights", heads, body, note), _ratios(results["budgets"])]


def _ratios(budgets: Json) -> Table:
    """Accelerate's times over ours, budget by budget."""
    body = []
    for budget, cells in budgets.items():
        both = [cells["ours"], cells.get("accelerate")]
        why = next((why for cell in both if (why := missing(cell))), None)
        ratios = ["-", "-"] if why else [_over(both, part) for part in ("prompt", "decode")]
        body.append([mebibytes(int(budget)), *ratios, why or ""])
    return Table("Accelerate's time over ours, on the same budget", ["budget", "prompt", "token", "why not"], body)


def _over(cells: list[Json], part: str) -> str:
    if any(missing(cell[part]) for cell in cells):
        return "-"
    return f"{number(cells[1][part]['median'] / cells[0][part]['median'])} x"


def _row(name: str, cell: Json) -> list[str]:
    why = missing(cell)
    if why is not None:
        return [name, why, *(["-"] * 5)]
    streamed = mebibytes(cell["streamed"]) if "streamed" in cell else "-"
    parts = [cell["prompt"], cell["decode"]]
    shares = [f"{100 * part['bus_share']:.1f} %" if "bus_share" in part else "-" for part in parts]
    return [name, mebibytes(cell["weights"]), streamed, *(figure(part) for part in parts), *shares]


def pictures(record: Record) -> list[Picture]:
    """Bars of milliseconds per token: whoever was measured, and beside ours what the bus alone takes."""
    bars: dict[str, list[tuple[float | str, float]]] = {}
    for budget, cells in record.results["budgets"].items():
        found = {
            who: cell["decode"]["median"]
            for who, cell in cells.items()
            if missing(cell) is None and missing(cell["decode"]) is None
        }
        if missing(cells["ours"]) is None:
            found["floor: the bus"] = cells["ours"]["floor_ms"]
        for who, value in found.items():
            bars.setdefault(who, []).append((f"{who}, {mebibytes(int(budget))}", value))
    if not bars:
        return []
    title = f"Milliseconds per token ({record.options['model']})"
    return [Picture(name="virtual", title=title, kind="bars", series=bars, x="ms")]
