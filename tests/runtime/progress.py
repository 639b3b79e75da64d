"""What a state machine has done so far: in a file too, for a machine that is killed says nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tests.runtime.setups import DEVICE, Setup

#: Folder for the files; none are written without it.
LOG = os.environ.get("DJINN_STATE_LOG", "")


def report(setup: Setup, seen: Mapping[str, int], took: float) -> str:
    """One line: how many examples ended well, and what they did."""
    others = {what: count for what, count in seen.items() if what != "examples"}
    return f"{vars(setup)} on {DEVICE}: {seen.get('examples', 0)} examples, {took:.0f} s, {others}"


def note(setup: Setup, seen: Mapping[str, int], took: float) -> None:
    """Write the line to the machine's file."""
    if LOG:
        _file(setup).write_text(report(setup, seen, took) + "\n", encoding="utf-8")


def forget(setup: Setup) -> None:
    """Remove the machine's file: it has said it itself."""
    if LOG:
        _file(setup).unlink(missing_ok=True)


def _file(setup: Setup) -> Path:
    return Path(LOG) / ("-".join(str(value) for value in vars(setup).values()) + ".txt")
