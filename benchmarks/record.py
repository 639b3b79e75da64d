"""Records: what one run of a benchmark leaves behind, as one JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Name and version of the file format.
FORMAT = "djinn-bench/1"

#: A value of a record: what JSON can hold.
Json = Any


@dataclass(frozen=True)
class Check:
    """One comparison that a benchmark made before it measured.

    Attributes:
        name: what was compared.
        held: whether the answer was right.
        detail: in figures.
        expected: False for a check that is there to show that something does not work; it fails no run.
    """

    name: str
    held: bool
    detail: str = ""
    expected: bool = True


@dataclass
class Record:
    """One run of one benchmark.

    Attributes:
        benchmark: its name.
        started: when, in UTC.
        options: how it was asked to run: model, device, dtype, seed, quick...
        environment: machine and versions.
        seconds: how long it took.
        checks: every comparison made.
        results: the benchmark's own tree of figures.
        log: seconds since the start and a line, in order.
    """

    benchmark: str
    started: str
    options: dict[str, Json]
    environment: dict[str, Json]
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    results: dict[str, Json] = field(default_factory=dict)
    log: list[tuple[float, str]] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether every answer that should be right was right."""
        return all(check.held for check in self.checks if check.expected)

    @property
    def title(self) -> str:
        """One line that tells this run from others."""
        where = self.environment.get("device_name", "?")
        quick = ", quick" if self.options.get("quick") else ""
        return f"{self.options['model']}, {self.options['dtype']}, {where}{quick}"


def finite(tree: Json) -> Json:
    """A tree with null where a number is NaN or infinite, which JSON cannot hold."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def save(record: Record, path: Path) -> Path:
    """Write a record as JSON, null for what is not finite; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, **finite(asdict(record))}
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> Record:
    """Read a record.

    Raises:
        ValueError: not a record of this format, or one that lacks something.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_a_figure)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; give one that `djinn-fx bench` wrote.") from error
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a benchmark record ({FORMAT}); give a JSON that `djinn-fx bench` wrote.")
    try:
        checks = [Check(**check) for check in document.pop("checks")]
        log = [(float(at), str(line)) for at, line in document.pop("log")]
        record = Record(checks=checks, log=log, **document)
        _examine(record)
        return record
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is a benchmark record that lacks something or holds too much: {why}") from error


def _not_a_figure(word: str) -> None:
    """No run writes NaN or an infinity.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"it holds {word}")


def _examine(record: Record) -> None:
    """Refuse a record whose fields are of other kinds.

    Raises:
        KeyError: an option that every report shows is missing.
        TypeError: something is of another kind.
    """
    record.seconds = float(record.seconds)
    said: Any = record.environment
    kinds: dict[str, tuple[type, Any]] = {
        "benchmark": (str, record.benchmark),
        "started": (str, record.started),
        "options": (dict, record.options),
        "environment": (dict, said),
        "versions": (dict, said.get("versions", {}) if isinstance(said, dict) else {}),
        "results": (dict, record.results),
    }
    for name, (kind, value) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    for name in ("model", "dtype"):
        _ = record.options[name]
