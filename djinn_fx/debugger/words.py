"""Reading the words of a command."""

from __future__ import annotations

import re
from collections.abc import Sequence

from djinn_fx.errors import InvalidValue


def number(text: str, what: str) -> int:
    """A whole number; ``what`` names it in the error.

    Raises:
        InvalidValue: it is none.
    """
    if not re.fullmatch(r"\d{1,9}", text):
        raise InvalidValue(f"{text!r} is no {what}; give a whole number.")
    return int(text)


def numbers(text: str, what: str) -> list[int]:
    """Whole numbers, each once."""
    return list(dict.fromkeys(number(word, what) for word in text.split()))


def amount(text: str, what: str) -> float:
    """A number.

    Raises:
        InvalidValue: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise InvalidValue(f"{text!r} is no {what}; give a number, such as 0.5.") from None


def listed(positions: Sequence[int], most: int = 8) -> str:
    """Positions by number, the first few of many."""
    shown = ", ".join(map(str, positions[:most])) + (", ..." if len(positions) > most else "")
    return f"position{'s' * (len(positions) > 1)} {shown}"


def between(first: int, last: int) -> str:
    """Positions from one to another."""
    return f"position {first}" if first == last else f"positions {first} to {last}"
