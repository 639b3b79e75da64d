"""Views as HTML for notebooks: no script, no style sheet, no colours but the notebook's own, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from djinn_fx.views import Cell, Curve, Share, Table, Text, View, visible

#: Characters of one text that are shown at most; a long one loses its middle.
LONGEST = 1200

_MUTED = "opacity:.65"
_CODE = "font-family:ui-monospace,monospace;font-size:12px;white-space:pre-wrap"


class Shown:
    """What can be seen in a notebook: a class says what by :meth:`describe`."""

    def describe(self) -> View:
        """What there is to be seen, as plain records; it changes nothing."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """For notebooks; never raises."""
        return render(self.describe, lambda: repr(self))


def render(describe: Callable[[], View], otherwise: Callable[[], str]) -> str:
    """A view as HTML; where it cannot be had, a text and the error. Never raises, as a notebook's output must not."""
    try:
        return page(describe())
    except Exception as error:
        return f"{_code(_attempt(otherwise))}<div>not shown: {_say(f'{type(error).__name__}: {error}', 400)}</div>"


def page(view: View) -> str:
    """A view as HTML.

    Raises:
        What reading the view raises.
    """
    state = f' <span style="{_MUTED}">{_say(view.state)}</span>' if view.state else ""
    inside = [f"<div><b>{_say(view.title)}</b>{state}</div>"]
    if view.facts:
        rows = "".join(
            f'<tr style="background:none"><td style="text-align:left;{_MUTED};padding:0 1em 0 0">{_say(name)}</td>'
            f'<td style="text-align:left;padding:0">{_say(fact)}</td></tr>'
            for name, fact in view.facts
        )
        inside.append(f'<table style="border:none;font-size:inherit;margin:2px 0">{rows}</table>')
    for part in view.parts:
        inside.append(_table(part) if isinstance(part, Table) else _named(*part))
    style = "font:13px/1.45 system-ui,sans-serif;color:inherit;max-width:64em;overflow-x:auto"
    return f'<div style="{style}">{"".join(inside)}</div>'


def sparkline(curve: Curve, width: int = 420, height: int = 44) -> str:
    """A curve as inline SVG: a line in the text's colour, marks as dots, what is not finite as dashed uprights."""
    finite = [value for value in curve.values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    pad = 4
    step = (width - 2 * pad) / max(1, len(curve.values) - 1)

    def x(index: int) -> float:
        return width / 2 if len(curve.values) == 1 else pad + index * step

    def y(value: float) -> float:
        share = 0.5 if high == low else (value - low) / (high - low)
        return height - pad - share * (height - 2 * pad)

    drawn, line = [], []
    for index, value in enumerate((*curve.values, math.nan)):
        if math.isfinite(value):
            line.append(f"{x(index):.1f},{y(value):.1f}")
        else:
            if len(line) == 1:
                line.append(line[0])  # a dot
            if line:
                points = " ".join(line)
                drawn.append(f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-linecap="round"/>')
            line = []
            if index < len(curve.values):
                at = f'x1="{x(index):.1f}" x2="{x(index):.1f}" y1="0" y2="{height}"'
                drawn.append(f'<line {at} stroke="currentColor" stroke-width="2" stroke-dasharray="2 2"/>')
    for index in curve.marks:
        if math.isfinite(curve.values[index]):
            at = f'cx="{x(index):.1f}" cy="{y(curve.values[index]):.1f}"'
            drawn.append(f'<circle {at} r="3" fill="currentColor"/>')
    said = f"{len(curve.values)} values, {number(low)} to {number(high)}"
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{said}" '
        f'style="vertical-align:middle"><title>{said}</title>{"".join(drawn)}</svg>'
    )


def number(value: float) -> str:
    """A number in a few characters; an infinity or NaN by name."""
    return f"{value:.3g}" if math.isfinite(value) and abs(value) < 1e5 else f"{value:.2g}"


def _named(name: str, part: Text | Curve) -> str:
    head = f'<div style="{_MUTED};margin-top:4px">{_say(name)}</div>'
    if isinstance(part, Text):
        return f"{head}<div>{_spans(part.spans)}</div>"
    finite = [value for value in part.values if math.isfinite(value)]
    lost = len(part.values) - len(finite)
    span = f"{number(min(finite))} to {number(max(finite))}" if finite else ""
    said = ", ".join([*([span] if span else []), *([f"{lost} not finite"] if lost else [])])
    ends = f'<span style="{_MUTED}">{_say(part.first)} … {_say(part.last)}: </span>' if part.first else ""
    return f"{head}<div>{sparkline(part)} {ends}{_say(said)}</div>"


def _table(table: Table) -> str:
    """A table: title, head, rows, note."""

    def cells(kind: str, row: Sequence[Cell], more: str = "") -> str:
        sides = ["left" if left else "right" for left in table.left]
        inner = "".join(
            f'<{kind} style="text-align:{side};padding:0 8px 0 0;white-space:nowrap{more}">{_cell(cell)}</{kind}>'
            for cell, side in zip(row, sides, strict=True)
        )
        return f'<tr style="background:none">{inner}</tr>'

    head = cells("th", table.columns, ";font-weight:normal;opacity:.65")
    body = "".join(
        cells("td", row, ";font-weight:bold" if index in table.strong else "") for index, row in enumerate(table.rows)
    )
    title = f'<div style="{_MUTED};margin-top:4px">{_say(table.title)}</div>' if table.title else ""
    note = f'<div style="{_MUTED}">{_say(table.note)}</div>' if table.note else ""
    whole = f"<thead>{head}</thead><tbody>{body}</tbody>"
    return f'{title}<table style="border:none;font-size:inherit;margin:0">{whole}</table>{note}'


def _cell(cell: Cell) -> str:
    if isinstance(cell, Curve):
        return sparkline(cell, 120, 18)
    if isinstance(cell, Share):
        wide = f"{max(0.0, min(1.0, cell.share)) * 100:.0f}%"
        bar = f"height:2px;width:{wide};margin:3px 0 2px;background:currentColor"  # a block: below every letter's tail
        return f'{_say(cell.text)} {cell.share:.0%}<div style="{bar}"></div>'
    return _say(cell)


def _spans(spans: Sequence[tuple[str, bool]]) -> str:
    return "".join(
        f'<span style="{_CODE};{_MUTED if back else ""}">{_say(text, LONGEST)}</span>' for text, back in spans
    )


def _code(text: str) -> str:
    return f'<span style="{_CODE}">{_say(text, LONGEST)}</span>'


def _say(text: str, longest: int = 300) -> str:
    """A text, escaped; a long one loses its middle."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return html.escape(visible(text))


def _attempt(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:
        return f"<{type(error).__name__}>"
