"""Regenerate the README's tables and its picture from committed records.

    python -m benchmarks.readme_tables [--check] [--card h100]

The records lie in a folder of ``benchmarks/results/`` that is named by the card; where there are several, say which.
Between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` stands what NAME gives: ``interactivity`` (the experiment at a
glance), ``steps`` (our decode graphs against the graph compiled whole), ``decode`` (milliseconds per token),
``picture`` (a token of the 8B shape, beside other systems). Nothing between them is typed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from djinn_fx.benchmarks import decode_report, plots, steps_report
from djinn_fx.benchmarks.interacting import report as interactivity_report
from djinn_fx.benchmarks.record import Record, load
from djinn_fx.benchmarks.report import table_body

ROOT = Path(__file__).resolve().parents[1]

#: Where the committed records lie, a folder for each card, and where pictures go, from the root.
RESULTS, IMAGES = Path("benchmarks/results"), Path("docs/images")

#: Cards by name, the first that there are records of is taken.
CARDS = ("h200", "h100")

MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def results_of(root: Path, card: str | None = None) -> Path:
    """The folder of the records of a card, or of the first card that there are records of.

    Raises:
        ValueError: there are none.
    """
    for name in (card,) if card else CARDS:
        folder = root / RESULTS / name
        if any(folder.glob("*.json")):
            return folder
    raise ValueError(f"no records under {RESULTS}/{card or ' or '.join(CARDS)}.")


def blocks(root: Path, card: str | None = None) -> dict[str, Callable[[], str]]:
    """What each name gives."""

    def record(name: str) -> Record:
        return load(results_of(root, card) / f"{name}.json")

    def every(name: str) -> list[Record]:
        folder = results_of(root, card)
        found = [load(path) for path in sorted(folder.glob(f"{name}_*.json"))]
        if not found:
            raise ValueError(f"no {name}_*.json under {folder}.")
        return found

    def interactivity() -> str:
        found = record("interactivity_gpt2")
        table = interactivity_report.tables(found)[0]
        return f"{table_body(table)}\n\n{_source(found)} {table.note}"

    def steps() -> str:
        found = every("steps")
        return f"{table_body(steps_report.combined(found))}\n\n{_source(*found)} Device time, medians."

    def decode() -> str:
        found = every("decode")
        return f"{table_body(decode_report.combined(found))}\n\n{_source(*found)} Medians; host work included."

    def picture() -> str:
        first = decode_report.pictures(record("decode_llama-8b-shape"))[0]
        path = plots.draw(first, root / IMAGES)
        return f"![{first.title}]({path.relative_to(root).as_posix()})"

    return {"interactivity": interactivity, "steps": steps, "decode": decode, "picture": picture}


def _source(*records: Record) -> str:
    """What the records were measured on, and when; whether all of them are right."""
    seen = [
        (
            r.environment["device_name"],
            r.options["dtype"],
            f"torch {r.environment['versions']['torch']}",
            r.started[:10],
        )
        for r in records
    ]
    said = ", ".join(" and ".join(dict.fromkeys(kind)) for kind in zip(*seen, strict=True))
    right = all(record.right for record in records)
    return f"{said}; every answer {'checked and right' if right else '**not** right'}."


def filled(text: str, root: Path = ROOT, card: str | None = None) -> str:
    """A page with every marked place filled, from the records of a card.

    Raises:
        ValueError: a name that gives nothing, or a record that is missing or damaged.
    """
    known = blocks(root, card)

    def fill(match: re.Match[str]) -> str:
        if match[2] not in known:
            raise ValueError(f"<!-- bench:{match[2]} -->: there are {', '.join(known)}.")
        return f"{match[1]}\n{known[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main() -> int:
    """Fill the README; with ``--check`` only say whether it is as the records have it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if something would change")
    parser.add_argument(
        "--card", help=f"whose records, a folder of {RESULTS}; default: the first of {', '.join(CARDS)}"
    )
    chosen = parser.parse_args()
    check: bool = chosen.check
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before, card=chosen.card)
    if not check:
        readme.write_text(after, encoding="utf-8")
    if not MARKED.search(before):
        print(f"{readme.name} has no marked place")
        return 1
    print("as the records have it" if before == after else "differs" if check else f"filled {readme.name}")
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())
