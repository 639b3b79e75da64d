"""Traces: the pass records of one build as a file of JSON lines, to be read later and on another machine.

The first line says what was built. Each pass has a line that holds the graph after it; the graph before it is the one
of the line above. The last line says which pass failed, if one did, and what the segments cost, if that was measured.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from djinn_fx._version import __version__
from djinn_fx.errors import InvalidValue
from djinn_fx.program import LiveInfo, NodeInfo, PassRecord, SegmentInfo

#: Environment variable with the folder that every build is recorded in; unset or empty: nothing is recorded.
VARIABLE = "DJINN_TRACE"
FORMAT = 1


@dataclass(frozen=True)
class Failure:
    """A pass that failed.

    Attributes:
        name: of the pass.
        message: what it raised.
        folder: where the graph before it, the message and the repro script are.
    """

    name: str
    message: str
    folder: str


@dataclass(frozen=True)
class SegmentCost:
    """What a segment was measured to cost.

    Attributes:
        name: of the segment.
        microseconds: median time of a run.
        kernels: kernels it launches; on the CPU without a compiler its ops.
        fusions_lost: kernels more than if the cut behind it were not there; None at the end.
        at_most: whether that is only a bound.
        arming: microseconds that the tables of its site cost; None where there are none.
    """

    name: str
    microseconds: float
    kernels: int
    fusions_lost: int | None
    at_most: bool
    arming: float | None


@dataclass(frozen=True)
class Trace:
    """The passes of one build.

    Attributes:
        model: a name for people.
        shape: batch rows, query tokens, kept positions.
        variant: the steering compiled in.
        records: one per pass that ran, as far as they got.
        versions: of what made it.
        failure: the pass that ended it, or None.
        costs: of the segments, where they were measured.
        code: what Inductor generated, by segment, where somebody asked.
    """

    model: str
    shape: tuple[int, int, int]
    variant: str
    records: tuple[PassRecord, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    costs: tuple[SegmentCost, ...] = ()
    code: Mapping[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions that a graph depends on."""
    return {"djinn_fx": __version__, "torch": str(torch.__version__)}


def record_build(trace: Trace, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Write a trace to a new file in the folder of ``DJINN_TRACE``; None where nobody asked.

    Raises:
        InvalidValue: the folder cannot be written to.
    """
    folder = environment.get(VARIABLE, "").strip()
    if not folder:
        return None
    rows, query, keep = trace.shape
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(3)}"
    path = Path(folder).expanduser() / f"{trace.model}-{rows}x{query}x{keep}-{trace.variant}-{stamp}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(trace, path)
    except OSError as error:
        raise InvalidValue(
            f"{VARIABLE}={folder!r}: {error}. Name a folder that can be written to, or unset it."
        ) from error


def write(trace: Trace, path: Path) -> Path:
    """Write a trace as JSON lines; the file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(3)}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in _lines(trace))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read(path: Path) -> Trace:
    """The trace in a file.

    Raises:
        OSError: there is no such file.
        InvalidValue: it is not a trace, or it is cut off or of another format.
    """
    try:
        first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        if first.get("djinn_trace") != FORMAT:
            raise InvalidValue(
                f"{path}: a trace of format {first.get('djinn_trace')!r}; this version reads {FORMAT}. Record it again."
            )
        *passes, last = rest
        if not last.get("end"):
            raise ValueError("the last line is missing")
        failure = None if last["failure"] is None else Failure(**last["failure"])
        trace = Trace(
            first["model"],
            tuple(first["shape"]),
            first["variant"],
            _records(first["before"], passes),
            first["versions"],
            failure,
            tuple(SegmentCost(**each) for each in last["costs"]),
            last["code"],
        )
        _check(trace, Trace)
        return trace
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue(
            f"{path}: not a whole trace ({type(error).__name__}: {error}). Traces are the .jsonl files that "
            f"{VARIABLE}=folder or `djinn-fx inspect MODEL --jsonl FILE` writes."
        ) from error


def _check(value: Any, hint: Any) -> None:
    """Refuse a value that is not of its type; of dataclasses, tuples and mappings also what they hold.

    Raises:
        TypeError: which one.
    """
    origin, inner = get_origin(hint), get_args(hint)
    kind: Any = origin or hint
    if origin is UnionType:
        if value is not None:
            _check(value, next(each for each in inner if each is not type(None)))
        return
    fits: bool = isinstance(value, (int, float) if kind is float else kind)
    if not fits:
        raise TypeError(f"{str(value)[:60]!r} is no {getattr(kind, '__name__', kind)}")
    if is_dataclass(kind):
        for name, each in _hints(hint).items():
            _check(getattr(value, name), each)
    elif kind is tuple:
        if inner[-1] is not ... and len(value) != len(inner):
            raise TypeError(f"{value!r} has not {len(inner)} parts")
        for each in value:
            _check(each, inner[0])
    elif kind is Mapping:
        for each in value.values():
            _check(each, inner[1])


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _lines(trace: Trace) -> Iterator[dict[str, Any]]:
    before = trace.records[0].before if trace.records else ()
    yield {
        "djinn_trace": FORMAT,
        "model": trace.model,
        "shape": list(trace.shape),
        "variant": trace.variant,
        "versions": dict(trace.versions),
        "before": [astuple(info) for info in before],
    }
    for record in trace.records:
        yield {
            "index": record.index,
            "name": record.name,
            "stage": record.stage,
            "seconds": record.seconds,
            "verdict": record.verdict,
            "after": [tuple(vars(info).values()) for info in record.after],
            "segments": [asdict(segment) for segment in record.segments],
        }
    yield {
        "end": True,
        "failure": None if trace.failure is None else asdict(trace.failure),
        "costs": [asdict(cost) for cost in trace.costs],
        "code": dict(trace.code),
    }


def _records(first: list[Any], passes: list[dict[str, Any]]) -> tuple[PassRecord, ...]:
    before = tuple(NodeInfo(*fields) for fields in first)
    found = []
    for line in passes:
        after = tuple(NodeInfo(*fields) for fields in line["after"])
        segments = tuple(_segment(each) for each in line["segments"])
        head = (line["index"], line["name"], line["stage"])
        found.append(PassRecord(*head, before, after, line["seconds"], line["verdict"], segments))
        before = after
    return tuple(found)


def _segment(fields: dict[str, Any]) -> SegmentInfo:
    live = tuple(LiveInfo(**each) for each in fields["live"])
    found = SegmentInfo(**{**fields, "live": live})
    return replace(found, inputs=tuple(found.inputs), outputs=tuple(found.outputs))
