"""A program explained: its passes, its segments and what crosses each yield point."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable

from djinn_fx.inspecting.making import trace_of_program
from djinn_fx.inspecting.tables import Table, tables
from djinn_fx.inspecting.text import heading
from djinn_fx.notebook import Shown
from djinn_fx.passes.trace import Trace
from djinn_fx.program import Program
from djinn_fx.views import View

#: Columns of a summary where there is no terminal that says how many it has.
WIDTH = 140


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """The summary of a program: a text by ``str``, a table in a terminal, HTML in a notebook.

    Attributes:
        trace: the passes and segments that it sums up.
    """

    trace: Trace

    def __str__(self) -> str:
        return "\n\n".join([heading(self.trace), *(plain(table) for table in tables(self.trace))])

    def __repr__(self) -> str:
        """As a terminal shows it, in colours where it has some."""
        if not getattr(sys.stdout, "isatty", bool)():
            return str(self)
        out = io.StringIO()
        shown = Console()
        Console(file=out, force_terminal=True, color_system="auto", width=shown.width).print(self)
        return out.getvalue().rstrip()

    def __rich__(self) -> Group:
        """For ``rich.print``."""
        return Group(f"[bold]{heading(self.trace)}[/bold]", *(rich_table(table) for table in tables(self.trace)))

    def describe(self) -> View:
        """The heading and the tables; notebooks show it."""
        return View(heading(self.trace), parts=tuple(tables(self.trace)))


def explain(program: Program, name: str = "program") -> Explanation:
    """The summary of a program."""
    return Explanation(trace_of_program(name, program))


def plain(table: Table) -> str:
    """A table as text, its columns aligned."""
    rows: Sequence[Sequence[str]] = [table.columns, *table.rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(table.columns))]

    def said(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, table.left, strict=True)
        ]
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join([table.title, *map(said, rows), *([f"  {table.note}"] if table.note else [])])


def rich_table(table: Table) -> RichTable:
    """A table for Rich."""
    shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, box=box.SIMPLE_HEAD)
    shown.caption_justify = "left"
    for name, left in zip(table.columns, table.left, strict=True):
        shown.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.replace("[", r"\[") for cell in row))
    return shown
