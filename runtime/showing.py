"""What stops, runs, caches and results show of themselves in a notebook: plain records, made without changing anything.

Values are reduced where they lie; only norms and a few probabilities come to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from djinn_fx.runtime.wording import (
    curve,
    edit,
    kind_of,
    nbytes,
    norms_of,
    numbers,
    pooled,
    row_norms,
    short,
    span,
    tail,
    word,
)
from djinn_fx.specs import Breakpoint
from djinn_fx.views import Cell, Curve, Share, Table, Text, View

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine
    from djinn_fx.runtime.modules import ModuleStop
    from djinn_fx.runtime.results import Cache, Result
    from djinn_fx.runtime.run import Run
    from djinn_fx.runtime.session import Session
    from djinn_fx.runtime.stop import Stop

#: Positions whose logit lens is shown, and words at each.
LENSES, WORDS = 4, 5

#: Rows of a table at most, and points of a curve in one.
ROWS, CELL_POINTS = 24, 32

_RESIDUALS = ("resid_pre", "resid_mid", "resid_post")


# -- stops -------------------------------------------------------------------------------------


def stop_view(stop: Stop) -> View:
    """Where and why a run stopped, the norm at each position, and the logit lens at the last ones."""
    engine, value = stop.session.engine, stop.content
    state = "" if stop.current else "stale: the run went on from here; its value can still be read"
    if stop.session.closed or engine.closed:
        state = "of a closed session; its value can still be read"
    marks = tuple(stop.positions.index(position) for position in stop.fired if position in stop.positions)
    parts: list[tuple[str, Text | Curve] | Table] = []
    if len(stop.positions) > 1:
        parts.append(("norm at each position", curve(norms_of(value), stop.positions[0], stop.positions[-1], marks)))
    parts.append(_lens(stop, value, marks))
    return View(
        f"Stop after {stop.site}",
        state,
        (
            ("where", f"{span(stop.positions)}, {stop.phase}"),
            ("why", _why(stop)),
            ("tokens", tail(engine, stop.tokens.tolist() if stop.current else list(stop.within.tokens))),
            ("value", f"{kind_of(value)}{', written to' if stop.written else ''}"),
            ("numbers" if len(stop.positions) == 1 else "all positions", numbers(value)),
            *_steering(stop.session),
        ),
        tuple(parts),
    )


def _why(stop: Stop) -> str:
    if not stop.fired:
        return "it was stepped, forked, restored or rewound to"
    armed = [_said(point.spec) for point in stop.run.breakpoints if stop.site in point.sites]
    return f"a breakpoint held at {span(stop.fired)}{': ' if armed else ''}{' or '.join(armed)}"


def _said(spec: Breakpoint) -> str:
    """A breakpoint as its user would write it, in short."""
    name = getattr(spec.when, "__name__", None) or repr(spec.when).partition("tensor(")[0].rstrip("(, =")
    parts = [
        repr(spec.site),
        *([] if spec.when is None else [f"when={name}"]),
        *([] if spec.positions == "all" else [f"positions={spec.positions!r}"]),
        *([] if spec.times is None else [f"times={spec.times}"]),
    ]
    return f"break_at({', '.join(parts)})"


def _lens(stop: Stop, value: torch.Tensor, marks: Sequence[int]) -> Table:
    """The positions that fired and the last one, each with its likeliest next tokens if the model ended here."""
    last = len(stop.positions) - 1
    some = len(marks) <= last  # not just all of them
    chosen = (sorted({*marks, last}) if marks and some else list(range(last + 1)))[-LENSES:]
    rows = value[chosen]
    words, note = _words(stop, rows)
    most = max(map(len, words), default=0)
    title = "logit lens: what the model would say if it ended here" if most else ""
    columns = ("position", "token", "norm", *["likeliest next", *[""] * most][:most])
    own = stop.within.tokens[-len(stop.positions) :]
    cells: tuple[tuple[Cell, ...], ...] = tuple(
        (str(stop.positions[index]), word(stop.session.engine, own[index]), short(norm), *more)
        for index, norm, more in zip(chosen, norms_of(rows), words, strict=True)
    )
    strong = tuple(place for place, index in enumerate(chosen) if index in marks)
    strong = strong if len(strong) < len(chosen) else ()
    return Table(title, columns, (False, True, False) + (True,) * most, cells, note, strong)


def _words(stop: Stop, rows: torch.Tensor) -> tuple[list[tuple[Share, ...]], str]:
    """The likeliest next tokens of each row, and why there are none."""
    none: list[tuple[Share, ...]] = [() for _ in rows]
    try:
        logits = _logits(stop, rows)
        if logits is None:
            return none, "the logit lens is shown at residual sites and at logits"
        best = logits.float().softmax(-1).topk(min(WORDS, logits.shape[-1]))
        shares, tokens = best.values.tolist(), best.indices.tolist()
    except Exception as error:  # a lens that cannot be had must not hide the rest
        return none, f"no logit lens: {type(error).__name__}: {error}"
    if any(math.isnan(share) for row in shares for share in row):
        return none, "no logit lens: its logits are not finite"
    engine = stop.session.engine
    return [
        tuple(Share(word(engine, int(token)), share) for token, share in zip(*pair, strict=True))
        for pair in zip(tokens, shares, strict=True)
    ], ""


def _logits(stop: Stop, rows: torch.Tensor) -> torch.Tensor | None:
    """Logits of some positions' values; None where the site has none."""
    role, engine = stop.place.role, stop.session.engine
    if stop.site == "logits":
        return rows
    if role not in _RESIDUALS or engine.unembed is None:
        return None
    engine.guard()
    return engine.unembed(rows)


def module_stop_view(stop: ModuleStop) -> View:
    """Where a plain module's run stopped, and its value's numbers."""
    state = "" if stop.run.stop is stop else "stale: the run went on from here; its value can still be read"
    value = stop.value.detach()
    return View(f"Stop after {stop.site}", state, (("value", kind_of(value)), ("numbers", numbers(value))))


# -- runs and sessions -------------------------------------------------------------------------


def run_view(run: Run) -> View:
    """A run's state, where it stands and may stop, and its text."""
    session = run.session
    state = "closed" if session.closed else _state(run)
    own = session.token_list[run.prompt_start : run.end]
    prompt = own[: run.prompt_end - run.prompt_start]
    wanted = f" of at most {run.options.max_new_tokens}" if run.options.kind == "generate" else ""
    stop = run.stop
    facts = [
        ("tokens", f"{len(prompt)} given, {run.generated} generated{wanted}"),
        ("stands at", f"{stop.site}, {span(stop.positions)}" if stop is not None else "no stop"),
        ("stops at", "; ".join(_armed(run)) or "nothing: it has no breakpoints"),
        *_steering(session),
    ]
    parts: list[tuple[str, Text | Curve] | Table] = [("text", _text(session.engine, prompt, own[len(prompt) :]))]
    if stop is not None and len(stop.positions) > 1:
        norms = curve(norms_of(stop.content), stop.positions[0], stop.positions[-1])
        parts.append((f"norm at each position, {stop.site}", norms))
    return View(f"Run: {run.options.kind}", state, tuple(facts), tuple(parts))


def _state(run: Run) -> str:
    if run.finished:
        return f"finished{f': {run.finish_reason}' if run.finish_reason else ''}"
    return "stopped" if run.stop is not None else "being driven" if run.driving else "paused"


def _armed(run: Run) -> list[str]:
    left = {None: "", 0: " (silent now)"}
    return [f"{_said(point.spec)}{left.get(point.left, f' ({point.left} left)')}" for point in run.breakpoints]


def session_view(session: Session) -> View:
    """A session's tokens, where its KV lies and what steers it."""
    where = "closed" if session.closed else f"KV on the {session.tier}"
    facts = (("tokens", f"{len(session.token_list)}, keys and values of {session.length}"), *_steering(session))
    if session.run is not None:
        facts = (*facts, ("run", f"{session.run.options.kind}, {_state(session.run)}"))
    return View("Session", where, facts, (("text", _text(session.engine, session.token_list, [])),))


def _steering(session: Session) -> tuple[tuple[str, str], ...]:
    said = "; ".join(edit(armed.edit) for armed in session.steering.values())
    return (("steering", said),) if said else ()


# -- results and caches ------------------------------------------------------------------------


def result_view(result: Result) -> View:
    """The outcome of a run: tokens, text and what it captured."""
    facts = [("tokens", str(result.tokens.numel()))]
    if result.logits is not None:
        facts.append(("logits", kind_of(result.logits)))
    parts: list[tuple[str, Text | Curve] | Table] = []
    if result.text is not None:
        parts.append(("generated text", Text(((result.text, False),))))
    if len(result.cache):
        parts.append(cache_table(result.cache, result.cache.axes))
    return View("Result", result.finish_reason or "", tuple(facts), tuple(parts))


def cache_view(cache: Cache, axes: int) -> View:
    """The captured sites: shapes, bytes and norms; ``axes`` as in :func:`cache_table`."""
    size = sum(value.nbytes for value in cache.values())
    state = f"{len(cache)} site{'s' * (len(cache) != 1)}, {nbytes(size)}"
    return View("Cache", state, parts=(cache_table(cache, axes),) if len(cache) else ())


def cache_table(values: Mapping[str, torch.Tensor], axes: int) -> Table:
    """A row for each site; norms are those of single positions, pads (all zeros) left out.

    Args:
        values: by site.
        axes: 2 where values begin ``[B, T]``, 1 for ``[T]``, 0 where they are a plain module's, of any shape.
    """
    rows: list[tuple[Cell, ...]] = []
    for name in list(values)[:ROWS]:
        value = values[name].detach()
        cells: tuple[Cell, ...] = ("", "", "")
        if value.is_floating_point() and value.dim() >= max(axes, 1) and value.numel():
            norms = pooled(row_norms(value, axes), CELL_POINTS)
            known = [norm for norm in norms if math.isfinite(norm)]
            mean = sum(known) / len(known) if known else math.nan
            lost = len(norms) - len(known)
            cells = (short(mean), short(max(known, default=math.nan)), Curve(tuple(norms)) if len(norms) > 1 else "")
            if lost:
                cells = (*cells[:1], f"{lost} not finite", cells[2])
        rows.append((name, kind_of(value), nbytes(value.nbytes), *cells))
    rest = len(values) - len(rows)
    columns = ("site", "value", "bytes", "mean norm", "largest", "norm over positions")
    left = (True, True, False, False, False, True)
    return Table("", columns, left, tuple(rows), f"and {rest} more sites" if rest > 0 else "")


def memory_view(components: Mapping[str, int], places: Iterable[tuple[str, int]]) -> View:
    """Bytes by component, and by session."""
    rows = tuple((name, nbytes(count)) for name, count in components.items())
    each = tuple((f"session {index}", tier, nbytes(count)) for index, (tier, count) in enumerate(places))
    tables = [Table("", ("component", "bytes"), (True, False), rows)]
    if each:
        more = f"and {len(each) - ROWS} more" if len(each) > ROWS else ""
        tables.append(Table("sessions", ("session", "KV on", "bytes"), (True, True, False), each[:ROWS], more))
    return View("Memory", parts=tuple(tables))


def _text(engine: Engine, given: list[int], made: list[int]) -> Text:
    if engine.tokenizer is None:
        return Text(((str(given)[1:-1], True), (f", {str(made)[1:-1]}" if made else "", False)))
    return Text(((engine.decode_text(given) or "", True), (engine.decode_text(made) or "", False)))
