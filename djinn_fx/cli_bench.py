"""``djinn-fx bench``: list benchmarks, run one, put two runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable

from djinn_fx.benchmarks.context import Options
from djinn_fx.benchmarks.registry import summaries
from djinn_fx.benchmarks.tables import Table

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

    console = Console()
    try:
        one = load(first)
        if second is None:
            path = reports.write(one, out or first.parent)
        else:
            other = load(second)
            for table in reports.side_by_side(one, other):
                console.print(_rich(table))
            path = reports.write_side_by_side(one, other, out or first.parent)
    except (OSError, ValueError) as error:
        console.print(f"[bold red]{type(error).__name__}[/bold red]: {error}")
        raise typer.Exit(2) from error
    console.print(str(path), soft_wrap=True)


def run_one(name: str, options: Options, out: Path, console: Console) -> bool:
    """Run a benchmark with progress, show its tables, write its files; returns whether every answer was right."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from djinn_fx.benchmarks import registry
    from djinn_fx.benchmarks import report as reports
    from djinn_fx.benchmarks.record import save

    entry = registry.find(name)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name)

        def told(line: str) -> None:
            first = line.partition("\n")[0]
            progress.update(task, description=f"{name}: {first[:80]}".replace("[", r"\["))
            if first.startswith(("right", "WRONG", "Traceback")) or "absent" in first or "left out" in first:
                progress.console.print(line, markup=False, highlight=False)

        record = registry.run(entry, options, told)
    path = save(record, out / registry.file_name(record))
    for table in entry.tables(record):
        console.print(_rich(table))
    console.print(f"{path}\n{reports.write(record, out)}", soft_wrap=True, markup=False)
    return record.right


def _rich(table: Table) -> RichTable:
    shown = RichTable(
        *table.columns, title=table.title, title_justify="left", caption=table.note, caption_justify="left"
    )
    for row in table.rows:
        shown.add_row(*(cell.replace("**", "").replace("[", r"\[") for cell in row))
    return shown


def _command(name: str) -> Callable[..., None]:
    """The command that runs a benchmark."""
    default = Options()

    def command(
        model: Annotated[
            str, typer.Option(help="gpt2, llama-8b-shape, storyteller, or a path or hub id of a causal LM.")
        ] = default.model,
        device: Annotated[str, typer.Option(help="cuda, cpu or auto.")] = default.device,
        dtype: Annotated[str, typer.Option(help="Of the weights; auto: bfloat16 on CUDA.")] = default.dtype,
        backend: Annotated[str, typer.Option(help="Of djinn.compile.")] = default.backend,
        quick: Annotated[bool, typer.Option("--quick", help="Less of everything: about a minute.")] = False,
        seed: Annotated[int, typer.Option(help="Of weights, prompts and statistics.")] = default.seed,
        budget_seconds: Annotated[float | None, typer.Option(help="Begin no part after so many seconds.")] = None,
        peers: Annotated[bool, typer.Option(help="Run other systems too.")] = True,
        out: Annotated[Path, typer.Option(help="Folder for JSON, report and pictures.")] = Path("bench"),
    ) -> None:
        from djinn_fx.errors import DjinnError

        console = Console()
        try:
            right = run_one(
                name, Options(model, device, dtype, backend, quick, seed, budget_seconds, peers), out, console
            )
        except (DjinnError, OSError, ValueError) as error:
            console.print(f"[bold red]{type(error).__name__}[/bold red]: {error}")
            raise typer.Exit(2) from error
        if not right:
            raise typer.Exit(1)

    return command


for _name, _summary in summaries().items():
    bench.command(_name, help=_summary)(_command(_name))
