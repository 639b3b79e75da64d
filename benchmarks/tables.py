"""Tables and pictures as data: what a benchmark says its record shows; how it looks is decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from djinn_fx.benchmarks.record import Json


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: above it.
        columns: heads.
        rows: of cells, as text.
        note: what it means, in a sentence or two.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
        name: of its file, without ending.
        title: above it.
        kind: ``"lines"`` (series of x and y) or ``"bars"`` (series of label and y).
        series: by name.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        log: axes of lines with a logarithmic scale, of ``"x"`` and ``"y"``.
        floor: lines across the bars: what each says, and where it is.
        spans: intervals of bars, by label: low and high.
    """

    name: str
    title: str
    kind: str
    series: Mapping[str, Sequence[tuple[float | str, float]]]
    x: str = ""
    y: str = ""
    log: str = ""
    floor: Mapping[str, float] = field(default_factory=dict)
    spans: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def missing(cell: Json) -> str | None:
    """Why a cell has no figure, or None if it has one."""
    if cell is None:
        return "-"
    if not isinstance(cell, dict):
        return None
    for word in ("refused", "absent", "unsupported", "skipped", "failed"):
        if word in cell:
            return f"{word}: {cell[word]}"
    return None


def figure(cell: Json, key: str = "median", digits: int = 3) -> str:
    """A figure of a cell as text, or why there is none."""
    why = missing(cell)
    if why is not None:
        return why
    value = cell[key] if isinstance(cell, dict) else cell
    return number(value, digits)


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and thousands set off."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10**digits or float(value).is_integer():
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.2e}"


def share(value: float, digits: int = 2) -> str:
    """A fraction as a percentage with a sign."""
    return f"{100 * value:+.{digits}f} %"


def mebibytes(nbytes: float) -> str:
    """Bytes as MiB."""
    return f"{number(nbytes / 2**20)} MiB"


def yes(held: bool) -> str:
    """A yes or no that is seen."""
    return "yes" if held else "**NO**"
