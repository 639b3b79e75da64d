"""What there is to be seen of a thing, as plain records: who knows the thing writes them, a renderer only reads them.

The runtime says with these what a stop, a run or a cache holds (``runtime/showing.py``); :mod:`djinn_fx.notebook` makes
HTML of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: What steers a terminal, or turns the direction of writing: never to be passed on from what a model said.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text with characters that would steer a terminal or turn its direction written as Python writes them."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


@dataclass(frozen=True)
class Curve:
    """Numbers in a row, such as a norm at each position.

    Attributes:
        values: the numbers; NaN and infinities are shown as such.
        first: what stands under the first one.
        last: what stands under the last one.
        marks: indices that stand out.
    """

    values: tuple[float, ...]
    first: str = ""
    last: str = ""
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    """A word with a share of the whole, 0 to 1, such as a token's probability."""

    text: str
    share: float


@dataclass(frozen=True)
class Text:
    """A text in spans; each says whether it stands back (a prompt) or not (what was generated)."""

    spans: tuple[tuple[str, bool], ...]


Cell = str | Share | Curve


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        title: what it shows.
        columns: their names.
        left: for each column whether it is aligned to the left.
        rows: the cells.
        note: a line below.
        strong: indices of rows that stand out.
    """

    title: str
    columns: tuple[str, ...]
    left: tuple[bool, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    strong: tuple[int, ...] = ()


@dataclass(frozen=True)
class View:
    """Everything there is to be seen of a thing.

    Attributes:
        title: what it is, in a few words.
        state: a word that stands beside the title, such as ``"stale"``.
        facts: names and values, in order.
        parts: texts, curves and tables, in order.
    """

    title: str
    state: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, Text | Curve] | Table, ...] = ()
