"""What a record of ``density`` shows."""

from __future__ import annotations

from djinn_fx.benchmarks.record import Json, Record
from djinn_fx.benchmarks.tables import Picture, Table, mebibytes, missing, number, share, yes

#: The ways in the order of the table, and what they are called there.
NAMES = {
    "resident": "everything resident",
    "tiers": "djinn_fx, tiers and hints",
    "tiers, no hints": "djinn_fx, tiers, no hints",
    "recompute": "recomputing each turn",
    "per layer": "Hugging Face, KV moved each turn",
    "offloaded cache": "Hugging Face, offloaded cache",
}


def tables(record: Record) -> list[Table]:
    """What is asked, turns by way and number of agents, what moves cost others."""
    return [_targets(record.results), _turns(record.results), _others(record.results["others"])]


def _targets(results: Json) -> Table:
    body = []
    for entry in results["targets"]:
        what = f"P99 to the first token: {NAMES[entry['of']]}, over {NAMES[entry['over']]}"
        asked = f"at {'most' if entry['at_most'] else 'least'} {number(entry['asked'])}"
        if entry["ratio"] is None:
            body.append([what, asked, "-", "-"])
            continue
        met = entry["ratio"] <= entry["asked"] if entry["at_most"] else entry["ratio"] >= entry["asked"]
        found = f"{'at least ' if entry['at_least'] else ''}{number(entry['ratio'])}"
        best = None if entry["at_most"] else _best(results, entry["of"])
        body.append([what, asked, found, yes(met) + (f"; everything resident: {best}" if best and not met else "")])
    return Table(f"What is asked at {results['sizes']['target']} agents", ["what", "asked", "found", "met"], body)


def _best(results: Json, way: str) -> str | None:
    """How much better than a way a server is that moves and recomputes nothing; None where that was not measured."""
    p99 = [
        results["ways"].get(name, {}).get(str(results["sizes"]["target"]), {}).get("first_ms", {}).get("p99")
        for name in (way, "resident")
    ]
    return number(p99[0] / p99[1]) if all(p99) else None


def _turns(results: Json) -> Table:
    sizes, body = results["sizes"], []
    for name, label in NAMES.items():
        for count, cell in results["ways"].get(name, {}).items():
            why = missing(cell) or cell.get("broke")
            if "first_ms" not in cell:
                body.append([label, count, why, *["-"] * 5])
                continue
            figures = [number(cell[part][which]) for part in ("first_ms", "turn_ms") for which in ("p50", "p99")]
            least = "at least " if "broke" in cell else ""
            done = f"{cell['turns'] - cell['unserved']} of {cell['turns']}"
            busy = f"{100 * cell['busy']:.0f} %"
            body.append([label, count, *(least + figure for figure in figures), done, busy])
    heads = ["way", "agents", "first token P50, ms", "P99", "whole turn P50, ms", "P99", "turns done", "busy"]
    note = (
        f"Each agent holds a prompt of {sizes['prompt']} tokens and its past turns, thinks for {sizes['think']:.3g} s "
        f"on average and asks for {sizes['new']} tokens; turns arrive for {sizes['window']:.3g} s by one seeded "
        "timetable, the same for every way, and waits count from the arrival. "
        f"Budget: {sizes['rows']} KV rows of {mebibytes(results['row_bytes'])}; `everything resident` has one an agent "
        f"(at most {results['seats']}). djinn_fx serves {sizes['batch']} turns at a time, in slices of "
        f"{sizes['slice']} tokens; recomputing runs the same programs and keeps tokens alone. `hints`: agents say for "
        "how long they go, up to a fifth wrong. Hugging Face's eager model serves one turn at a time: `offloaded "
        "cache` is `DynamicCache(offloading=True)`, which moves each layer in and out in every step; the other moves "
        "its plain cache once a turn, to pinned memory, by copies of ours. A way broke down where turns were left over "
        "a quarter of the window after the last arrival; what waited is counted up to then. `busy`: the part of the "
        "time in which the server had something to do."
    )
    return Table("Agents that come and go", heads, body, note)


def _others(part: Json) -> Table:
    title, why = "What sessions on the move cost one that decodes", missing(part)
    if why is not None:
        return Table(title, ["why"], [[why]])
    body = []
    for name, found in part["rates"].items():
        steps = f"{number(found['alone_ms'])} -> {number(found['moving_ms'])}"
        tails = f"{number(found['alone_p99_ms'])} -> {number(found['moving_p99_ms'])}"
        moved = f"{found['moved_bytes_per_second'] / 1e9:.2f} GB/s, {found['moves']} moves"
        interval = f"{share(found['low'])} to {share(found['high'])}"
        body.append([name, moved, steps, share(found["overhead"]), interval, tails])
    heads = ["moving", "out and in", "ms per step", "step time", "95 % interval", "P99 between tokens, ms"]
    note = (
        f"One session decodes alone while a second thread moves others ({mebibytes(part['nbytes'])} each) out and in, "
        "and while it does not, in turns. Asked: at most +3 % while sessions stream. The first rate is that of the "
        f"agents above; the second is limited by the bus ({part['bus_bytes_per_second'] / 1e9:.1f} GB/s, one copy)."
    )
    return Table(title, heads, body, note)


def pictures(record: Record) -> list[Picture]:
    """P99 to the first token over the number of agents, each way up to where it breaks."""
    series: dict[str, list[tuple[float | str, float]]] = {}
    for name, label in NAMES.items():
        cells = record.results["ways"].get(name, {})
        points: list[tuple[float | str, float]] = [
            (int(count), cell["first_ms"]["p99"])
            for count, cell in cells.items()
            if "first_ms" in cell and "broke" not in cell
        ]
        if points:
            series[label] = points
    if not series:
        return []
    title = f"Arrival to first token, P99 ({record.options['model']})"
    return [Picture(name="density", title=title, kind="lines", series=series, x="agents", y="ms", log="xy")]
