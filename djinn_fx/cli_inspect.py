"""``djinn-fx inspect``: what each pass of the compiler did to a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from djinn_fx.errors import DjinnError, InvalidValue

if TYPE_CHECKING:
    import torch

    from djinn_fx.inspecting.making import Choice, Subject
    from djinn_fx.inspecting.text import Asked
    from djinn_fx.passes.trace import Trace

_MODELS = "storyteller, gpt2, llama-8b-shape, tiny"


def inspect(
    model: Annotated[
        str,
        typer.Argument(help=f"{_MODELS}; a path or hub id of a causal LM (its weights are not read); or a FILE.jsonl."),
    ] = "storyteller",
    after_all: Annotated[bool, typer.Option("--after-all", help="Show the graph after every pass.")] = False,
    after_change: Annotated[
        bool, typer.Option("--after-change", help="Show the graph after passes that changed something (default).")
    ] = False,
    after: Annotated[str | None, typer.Option(metavar="PASS", help="Show the graph after this pass only.")] = None,
    diff: Annotated[bool, typer.Option("--diff", help="Show what each pass did, not the graph it made.")] = False,
    summary: Annotated[bool, typer.Option("--summary", help="Show no graph, only the tables.")] = False,
    layer: Annotated[int | None, typer.Option(help="Show this layer only.")] = None,
    site: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Show these sites only, what they read and who reads them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page shows, as JSON.")] = False,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page for a browser.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record the passes, to be inspected later.")
    ] = None,
    on_failure: Annotated[
        bool, typer.Option("--on-failure", help="Print nothing, unless a pass fails: then the graph before it.")
    ] = False,
    stop_after: Annotated[str | None, typer.Option(metavar="PASS", help="Run no pass behind this one.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run it: time, kernels, fusions lost, cost of arming.")
    ] = False,
    code: Annotated[
        str | None, typer.Option(metavar="SEGMENT", help="Show Inductor's code of a segment: 3, or resid_post.3.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="That --measure runs: eager, inductor; auto: inductor on CUDA.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights, e.g. bfloat16; auto: the model's own.")] = "auto",
    layers: Annotated[int | None, typer.Option(min=1, help="Another number of layers.")] = None,
    sites: Annotated[list[str] | None, typer.Option(help="Sites to compile in; resid_post by default.")] = None,
    variant: Annotated[str, typer.Option(help="Steering to compile in: plain, armed or rank.")] = "armed",
    rows: Annotated[int, typer.Option(min=1, help="Batch rows.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Query tokens: 1 decodes, more is a prompt's chunk.")] = 1,
) -> None:
    """Show what each pass of the compiler did: graphs as Python, diffs, segments and what they cost."""
    notes = Console(stderr=True)  # what is no part of the output, which may be JSON for another program
    where: Literal["all", "change"] = "all" if after_all else "change"
    try:
        if after_all + after_change + (after is not None) > 1:
            raise InvalidValue("--after-all, --after-change and --after PASS: choose one.")
        if stop_after is not None and (measure or code is not None):
            raise InvalidValue("--measure and --code need every pass: leave --stop-after out.")
        _writable(page, jsonl)
        from djinn_fx.inspecting.text import Asked

        asked = Asked(where, after, diff, layer, site)
        making = _Making(model, device, dtype, layers, sites or ["resid_post"], variant, rows, tokens)
        trace = making.trace(notes, stop_after, measure, backend, code)
        if jsonl is not None:
            from djinn_fx.passes.trace import write

            write(trace, jsonl)
        failed = trace.failure is not None
        if page is not None:
            from djinn_fx.inspecting.page import page as page_of

            page.write_text(page_of(trace), encoding="utf-8")
            notes.print(f"{page}: {page.stat().st_size:,} bytes", soft_wrap=True, markup=False)
        if as_json:
            from djinn_fx.inspecting.page import document

            print(json.dumps(document(trace), indent=1))
        elif code is not None:
            for name, text in trace.code.items():
                print(f"# == {name} ==\n{text}")
        elif failed or summary or not (on_failure or page or jsonl):
            _show(trace, asked, summary, Console())
    except (DjinnError, OSError, ValueError) as error:
        notes.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        notes.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    if failed:
        raise typer.Exit(1)


def _show(trace: Trace, asked: Asked, summary: bool, console: Console) -> None:
    """Graphs and tables; of a trace that ended in a failure the graph before it."""
    from djinn_fx.explain import Explanation
    from djinn_fx.inspecting.text import failure_text, render

    if trace.failure is not None:
        print(failure_text(trace))
    else:
        graphs = render(trace, asked)  # also where it is not shown: it knows whether what was asked for is there
        if not summary:
            print(graphs, end="\n\n")
    explained = Explanation(trace)
    if console.is_terminal:
        console.print(explained)
    else:
        print(explained)


def _writable(*files: Path | None) -> None:
    """Refuse, before anything is computed, files that could not be written."""
    for file in files:
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            what = "is a folder; name a file in it" if file.is_dir() else f"there is no folder {file.parent}"
            raise InvalidValue(f"cannot write {file}: {what}.")


class _Making:
    """Where a trace comes from."""

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str,
        layers: int | None,
        sites: list[str],
        variant: str,
        rows: int,
        tokens: int,
    ) -> None:
        from djinn_fx.inspecting.making import Choice
        from djinn_fx.specs import ProgramShape

        if variant not in ("plain", "armed", "rank"):
            raise InvalidValue(f"--variant {variant!r}: choose plain, armed or rank.")
        self.model, self.device, self.dtype, self.layers = model, device, dtype, layers
        self.choice = Choice(ProgramShape(rows, tokens, 1), variant, tuple(sites))  # type: ignore[arg-type]

    def trace(self, console: Console, stop_after: str | None, measure: bool, backend: str, code: str | None) -> Trace:
        """Read a recorded trace, or make a new one."""
        from djinn_fx.inspecting.making import is_trace, read_trace, trace_of

        if is_trace(self.model):
            if measure or code is not None or stop_after is not None:
                raise InvalidValue(
                    "a recorded trace holds no weights: --measure, --code and --stop-after need a model."
                )
            return read_trace(Path(self.model))
        if backend not in ("auto", "eager", "inductor"):
            raise InvalidValue(f"--backend {backend!r}: choose auto, eager or inductor.")
        if backend == "auto":
            backend = "inductor" if self.device.startswith("cuda") else "eager"
        with console.status(f"capturing {self.model}") as status:
            what = self._subject(measure)
            trace = trace_of(what, self.choice, stop_after)
            if trace.failure is None and measure:
                from djinn_fx.inspecting.measuring import measure as measured

                trace = replace(trace, costs=measured(what, self.choice, backend, status.update))
            if trace.failure is None and code is not None:
                status.update("Inductor generates code")
                trace = replace(trace, code=_code(what, self.choice, code))
        return trace

    def _subject(self, filled: bool) -> Subject:
        """The model; with ``filled`` its weights hold numbers, since what a kernel costs may depend on them."""
        import torch

        from djinn_fx.benchmarks.models import BUILT_IN, configuration, load
        from djinn_fx.inspecting.making import configuration_of, hollow, subject

        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise InvalidValue(f"--dtype {self.dtype!r}: name one of torch's, e.g. float32 or bfloat16.")
        device = _device(self.device)
        config: Any = configuration(self.model)
        if config is None:
            from djinn_fx import bundled

            config = configuration_of(str(bundled.PATH) if self.model == "storyteller" else self.model, BUILT_IN)
        dtype = getattr(config, "dtype", None) or torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        if filled:
            model = load(self.model, device, dtype, layers=self.layers).model
        else:
            if self.layers is not None:
                config.get_text_config().num_hidden_layers = self.layers
            config.dtype = dtype
            with device:
                model = hollow(config)
        return subject(self.model.rstrip("/").rpartition("/")[2], model, self.choice)


def _device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        InvalidValue: there is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidValue(f"--device {name!r}: {str(error).splitlines()[0]}.") from error
    return device


def _code(what: Subject, choice: Choice, wanted: str) -> dict[str, str]:
    """Inductor's code of one segment, or with ``all`` of each that is unlike the others."""
    from djinn_fx.inspecting.code import find_segment, generated_code
    from djinn_fx.inspecting.making import program_of

    program = program_of(what, choice)
    if wanted != "all":
        segment = find_segment(program, wanted)
        return {segment.name: generated_code(segment.graph)}
    made: dict[str, str] = {}
    for segment in program.segments:
        if segment.compile_class not in made:
            made[segment.compile_class] = generated_code(segment.graph)
    return {segment.name: made[segment.compile_class] for segment in program.segments}
