"""``djinn-fx bench``: list benchmarks, run one, put two runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.registry import summaries
from djinn_fx.benchmarks.tables import Table

#: Tables that a run shows in the terminal: the first ones say the most.
SHOWN = 2

bench = typer.Typer(help="Benchmarks: exactness first, then speed.", no_args_is_help=False)


@bench.callback(invoke_without_command=True)
def listing(context: typer.Context) -> None:
    """Benchmarks: exactness first, then speed. Without a name, list them."""
    if context.invoked_subcommand is not None:
        return
    table = RichTable("benchmark", "what it measures", box=None)
    for name, summary in summaries().items():
        table.add_row(f"[bold]{name}[/bold]", summary)
    console = Console()
    console.print(table)
    console.print("\n  djinn-fx bench NAME --quick, or djinn-fx bench report A.json B.json")


@bench.command()
def report(
    first: Annotated[Path, typer.Argument(help="A record: the JSON of a run.")],
    second: Annotated[Path | None, typer.Argument(help="Another run of the same benchmark.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: that of the first record.")] = None,
) -> None:
    """Write the report of one record, or put two side by side."""
    from djinn_fx.benchmarks import report as reports
    from djinn_fx.benchmarks.record import load
    from djinn_fx.benchmarks.registry import folder_for

    console = Console()
    try:
        one = load(first)
        if second is None:
            path = reports.write(one, folder_for(out or first.parent))
        else:
            other = load(second)
            for table in reports.side_by_side(one, other):
                console.print(_rich(table))
            path = reports.write_side_by_side(one, other, folder_for(out or first.parent))
    except FileNotFoundError as error:
        console.print(f"no record at {error.filename}: give the JSON file that a run wrote.", markup=False)
        raise typer.Exit(2) from error
    except (OSError, ValueError) as error:
        _failed(console, error)
        raise typer.Exit(2) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        files = " or ".join(str(path) for path in (first, second) if path is not None)
        why = f"{type(error).__name__}: {error}"
        console.print(
            f"{files} lacks what its report shows, or holds something else there ({why}): it was changed, or another "
            "version wrote it; run the benchmark again.",
            markup=False,
        )
        raise typer.Exit(2) from error
    console.print(str(path), soft_wrap=True, markup=False)


def _failed(console: Console, error: Exception) -> None:
    """Say what went wrong; its text is no markup."""
    console.print(f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}")


def run_one(name: str, options: Options, out: Path, console: Console, *, full: bool = False) -> bool:
    """Run a benchmark with progress, show its telling tables, write its files; returns whether every answer was right.

    Args:
        name: of the benchmark.
        options: how it runs.
        out: folder for its files.
        console: where to show it.
        full: show every table and every comparison; they are in the report in any case.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from djinn_fx.benchmarks import plots, registry
    from djinn_fx.benchmarks import report as reports
    from djinn_fx.benchmarks.record import save

    options.resolved()
    entry = registry.find(name)
    parts = registry.parts_of(name, options, registry.folder_for(out))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name)

        def told(line: str) -> None:
            first = line.partition("\n")[0]
            progress.update(task, description=escape(f"{name}: {first[:80]}"))
            loud = first.startswith(("WRONG", "Traceback")) or "absent" in first or "left out" in first
            if loud or (full and first.startswith("right")):
                progress.console.print(line, markup=False, highlight=False)

        try:
            record = registry.run(entry, options, told, parts.keep)
        except KeyboardInterrupt:
            progress.console.print(parts.left, soft_wrap=True, markup=False)
            raise typer.Exit(registry.INTERRUPTED) from None
    path = save(record, out / registry.file_name(record))
    parts.clear()
    written = reports.write(record, out)
    tables = entry.tables(record)
    for table in tables if full else tables[:SHOWN]:
        console.print(_rich(table))
    if not full and len(tables) > SHOWN:
        console.print(f"{len(tables) - SHOWN} more tables are in the report; --full shows them here.", style="dim")
    why = plots.drawable()
    if why is not None:
        console.print(f"No pictures: {why}.", style="yellow", markup=False)
    held = sum(check.held for check in record.checks)
    console.print(f"{reports.verdict(record)} {held} of {len(record.checks)} comparisons held.", markup=False)
    console.print(f"{path}\n{written}", soft_wrap=True, markup=False)
    return record.right


def _rich(table: Table) -> RichTable:
    title, note = escape(table.title), escape(table.note)
    shown = RichTable(title=title, title_justify="left", caption=note, caption_justify="left")
    for column in table.columns:
        shown.add_column(escape(column), overflow="fold")  # an ellipsis would hide digits
    for row in table.rows:
        shown.add_row(*(escape(cell.replace("**", "")) for cell in row))
    return shown


def _command(name: str) -> Callable[..., None]:
    """The command that runs a benchmark."""
    default = Options()

    def command(
        model: Annotated[
            str,
            typer.Option(
                help="gpt2 or llama-8b-shape (random weights), tiny (the same, to try a benchmark out), storyteller "
                "(bundled), or a path or hub id of a causal LM."
            ),
        ] = default.model,
        device: Annotated[str, typer.Option(help="cuda, cpu or auto.")] = default.device,
        dtype: Annotated[str, typer.Option(help="Of the weights; auto: bfloat16 on CUDA.")] = default.dtype,
        backend: Annotated[str, typer.Option(help="Of djinn.compile.")] = default.backend,
        quick: Annotated[bool, typer.Option("--quick", help="Less of everything: about a minute.")] = False,
        seed: Annotated[int, typer.Option(help="Of weights, prompts and statistics.")] = default.seed,
        budget_seconds: Annotated[float | None, typer.Option(help="Begin no part after so many seconds.")] = None,
        peers: Annotated[bool, typer.Option(help="Run other systems too.")] = True,
        depths: Annotated[str, typer.Option(help="compile: numbers of layers, such as 4,32.")] = default.depths,
        full: Annotated[bool, typer.Option("--full", help="Show every table and comparison here.")] = False,
        out: Annotated[Path, typer.Option(help="Folder for JSON, report and pictures.")] = Path("bench"),
    ) -> None:
        from djinn_fx.errors import DjinnError

        console = Console()
        try:
            options = Options(model, device, dtype, backend, quick, seed, budget_seconds, peers, depths)
            right = run_one(name, options, out, console, full=full)
        except (DjinnError, OSError, ValueError) as error:
            _failed(console, error)
            raise typer.Exit(2) from error
        if not right:
            raise typer.Exit(1)

    return command


for _name, _summary in summaries().items():
    bench.command(_name, help=_summary)(_command(_name))
