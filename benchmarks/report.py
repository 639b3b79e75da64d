"""Reports: Markdown and pictures from records, one alone or two side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from djinn_fx.benchmarks import plots
from djinn_fx.benchmarks.record import Json, Record, finite
from djinn_fx.benchmarks.registry import file_name, find
from djinn_fx.benchmarks.tables import Table, figure, missing, yes

#: Keys that name an entry of a list, in the order in which they are said.
NAMES = ("kind", "depth", "act", "layer", "trial", "mib", "tokens")


def markdown(table: Table) -> str:
    """A table in Markdown, with its title and its note."""
    lines = [f"### {table.title}", "", table_body(table)]
    return "\n".join([*lines, "", table.note] if table.note else lines)


def table_body(table: Table) -> str:
    """A table in Markdown alone."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows)


def _escaped(cell: str) -> str:
    return " ".join(str(cell).replace("|", "\\|").split())


def write(record: Record, folder: Path) -> Path:
    """A record's report, pictures, log and the files it adds; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = find(record.benchmark)
    stem = Path(file_name(record)).stem
    for name, content in entry.extras(record).items():
        (folder / name).write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    log = "".join(f"{at:9.3f}  {line}\n" for at, line in record.log)
    (folder / f"{stem}.log").write_text(log, encoding="utf-8")
    parts = [f"# {record.benchmark}: {record.title}", verdict(record)]
    parts += [markdown(table) for table in entry.tables(record)]
    parts += _pictures(record, folder, stem)
    parts += ["## Checks", table_body(_checks(record)), "## Environment", table_body(_environment(record))]
    path = folder / f"{stem}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def verdict(record: Record) -> str:
    """Whether every answer was right, or none was compared; when it ran and how."""
    wrong = [check.name for check in record.checks if check.expected and not check.held]
    said = (
        "Every answer was right." if not wrong else f"**WRONG: {'; '.join(wrong)}.** What is wrong has no speed here."
    )
    said = said if record.checks else "Nothing was measured: no answer was compared."
    seed = record.options.get("seed", "?")
    return f"{said} {record.started}, {record.seconds:.0f} s, {record.options['dtype']}, seed {seed}."


def _pictures(record: Record, folder: Path, stem: str) -> list[str]:
    why = plots.drawable()
    if why is not None:
        return [f"No pictures: {why}."]
    drawn = [plots.draw(picture, folder, f"{stem}_") for picture in find(record.benchmark).pictures(record)]
    return [f"![{path.stem}]({path.name})" for path in drawn]


def _checks(record: Record) -> Table:
    rows = [
        [
            check.name,
            yes(check.held) if check.expected else "no, as expected" if not check.held else "yes",
            check.detail,
        ]
        for check in record.checks
    ]
    return Table("Checks", ["what was compared", "right", "in figures"], rows)


def _environment(record: Record) -> Table:
    versions = record.environment.get("versions", {})
    plain = {key: value for key, value in record.environment.items() if not isinstance(value, dict)}
    rows = [[key, str(value)] for key, value in {**plain, **versions}.items()]
    return Table("Environment", ["what", "value"], rows)


def side_by_side(first: Record, second: Record) -> list[Table]:
    """Every figure that two records of one benchmark share, and every one that only one of them has.

    Raises:
        ValueError: records of different benchmarks.
    """
    if first.benchmark != second.benchmark:
        raise ValueError(
            f"{first.benchmark} and {second.benchmark} cannot be put side by side: one benchmark, two runs."
        )
    ours, theirs = dict(cells(first.results)), dict(cells(second.results))
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        a: Json = ours.get(name)
        b: Json = theirs.get(name)
        both = missing(a) is None and missing(b) is None
        ratio = f"{b['median'] / a['median']:.3f}" if both and a["median"] else "-"
        unit = next((cell["unit"] for cell in (a, b) if missing(cell) is None), "")
        rows.append([name, unit, figure(a), figure(b), ratio])
    setting = [
        [key, str(first.options.get(key)), str(second.options.get(key))]
        for key in dict.fromkeys([*first.options, *second.options])
        if first.options.get(key) != second.options.get(key)
    ]
    machines = [["device", *(str(r.environment.get("device_name")) for r in (first, second))]]
    versions = [r.environment.get("versions", {}) for r in (first, second)]
    machines += [
        [name, str(versions[0].get(name)), str(versions[1].get(name))]
        for name in dict.fromkeys([*versions[0], *versions[1]])
    ]
    exact = [["every answer right", *(yes(r.right) for r in (first, second))]]
    return [
        Table(
            "The two runs",
            ["what", "A", "B"],
            [["started", first.started, second.started], *exact, *setting, *machines],
        ),
        Table("Medians", ["what", "unit", "A", "B", "B / A"], rows, "Below 1, B is faster or smaller."),
    ]


def cells(results: Json, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every cell of a tree of results, one with a median or with a reason, by its path as text."""
    if isinstance(results, dict):
        if "median" in results or missing(results) is not None:
            yield " / ".join(path), results
            return
        for key, value in results.items():
            yield from cells(value, (*path, str(key)))
    elif isinstance(results, list):
        for index, value in enumerate(results):
            if isinstance(value, dict):
                said = [f"{key} {value[key]}" for key in NAMES if key in value]
                yield from cells(value, (*path, ", ".join(said) or str(index)))


def write_side_by_side(first: Record, second: Record, folder: Path) -> Path:
    """A report of two runs; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {first.benchmark}: two runs", f"A: {first.title}. B: {second.title}."]
    parts += [markdown(table) for table in side_by_side(first, second)]
    path = folder / f"{first.benchmark}_side_by_side.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path
