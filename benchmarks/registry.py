"""The registry: a benchmark is a file of this folder that names one :class:`Benchmark` ``BENCHMARK``."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from djinn_fx.benchmarks.context import Context, Options
from djinn_fx.benchmarks.environment import environment
from djinn_fx.benchmarks.record import Json, Record, finite, save
from djinn_fx.benchmarks.tables import Picture, Table
from djinn_fx.errors import InvalidValue

#: The package whose files are looked through.
PACKAGE = "djinn_fx.benchmarks"

#: Exit status of a run that was ended by Ctrl-C, as shells have it.
INTERRUPTED = 130


@dataclass(frozen=True)
class Benchmark:
    """One registered benchmark.

    Attributes:
        name: on the command line and in file names; that of its file.
        run: measures; returns the record's ``results``.
        tables: the report's tables, from a record.
        pictures: the report's pictures, from a record.
        extras: more files for the report's folder, from a record: name and content.
    """

    name: str
    run: Callable[[Context], dict[str, Json]]
    tables: Callable[[Record], list[Table]]
    pictures: Callable[[Record], list[Picture]]
    extras: Callable[[Record], dict[str, Json]] = lambda record: {}


def discover() -> dict[str, Benchmark]:
    """Every benchmark of the folder, by name; files that name none, such as scripts for a GPU, are not imported."""
    found: dict[str, Benchmark] = {}
    for name in summaries():
        found[name] = importlib.import_module(f"{PACKAGE}.{name}").BENCHMARK
    return found


def summaries() -> dict[str, str]:
    """Name and first line of every benchmark, read off the files without importing one; a broken file says so."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search(r"^BENCHMARK\b", source, re.MULTILINE):
            try:
                found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            except SyntaxError as error:
                found[path.stem] = f"broken: {error.msg}, line {error.lineno}"
    return found


def find(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        ValueError: there is none, and says which there are; or its file cannot be imported.
    """
    known = summaries()
    if name not in known:
        raise ValueError(f"no benchmark is called {name!r}; there are {', '.join(known)}.")
    try:
        entry: Benchmark = importlib.import_module(f"{PACKAGE}.{name}").BENCHMARK
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"the benchmark {name!r} cannot be imported ({why}): mend benchmarks/{name}.py.") from error
    return entry


def run(
    entry: Benchmark,
    options: Options,
    listener: Callable[[str], object] = print,
    keep: Callable[[str, Json], object] = lambda name, found: None,
) -> Record:
    """Run a benchmark from start to end; ``keep`` is given each part as soon as it is done."""
    context = Context(options.resolved(), listener, keep)
    torch.manual_seed(options.seed)
    record = Record(
        benchmark=entry.name,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        options=asdict(context.options),
        environment=environment(context.device),
        checks=context.checks,
        log=context.log,
    )
    context.say(f"{entry.name}: {record.title}")
    with torch.inference_mode(False), torch.no_grad():
        record.results = entry.run(context)
    record.seconds = round(context.spent, 3)
    wrong = [check.name for check in record.checks if check.expected and not check.held]
    context.say(f"{entry.name}: {record.seconds:.0f} s, {f'WRONG: {wrong}' if wrong else 'every answer right'}")
    return record


def file_name(record: Record) -> str:
    """The name of a record's JSON."""
    return f"{_stem(record.benchmark, str(record.options['model']))}.json"


def _stem(benchmark: str, model: str) -> str:
    """How a run's files are called, without their endings."""
    return f"{benchmark}_{Path(model).name or 'model'}"


def folder_for(out: Path) -> Path:
    """The folder of a run's files, made and tried before anything is measured.

    Raises:
        InvalidValue: no file can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise InvalidValue(f"--out {out}: no folder that can be written ({error.strerror}); give another.") from error


def parts_of(name: str, options: Options, out: Path) -> Parts:
    """Where the parts of a run are kept; what an earlier run left there is removed."""
    found = Parts(out / f"{_stem(name, options.model)}.parts.jsonl")
    found.clear()
    return found


@dataclass(frozen=True)
class Parts:
    """What is left of a run that is killed: each part as it was done, a line of JSON each.

    Attributes:
        path: of the file.
    """

    path: Path

    def keep(self, name: str, found: Json) -> None:
        """Write a part down; one that holds objects for the next part is left out."""
        try:
            line = json.dumps({"part": name, "found": finite(found)}, allow_nan=False)
        except TypeError:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def left(self) -> str:
        """What a run that was interrupted says."""
        what = f"the parts done so far are in {self.path}" if self.path.exists() else "no part was done"
        return f"interrupted: {what}; there is no record and no report."

    def clear(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _ended(number: int, frame: object) -> None:
    """What is under way fails, and what was measured before it is still written."""
    raise TimeoutError("ended from outside")


def main(name: str, arguments: list[str] | None = None) -> int:
    """Run a benchmark as a script that needs torch, transformers and numpy alone; writes the JSON.

    Returns:
        0, or 1 if an answer was wrong, or 130 if it was interrupted.
    """
    entry = find(name)
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=summaries()[name])
    default = Options()
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--dtype", default=default.dtype)
    parser.add_argument("--backend", default=default.backend)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--budget-seconds", type=float)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure no other systems")
    parser.add_argument("--depths", default=default.depths, help="compile: numbers of layers, such as 4,32")
    parser.add_argument("--out", type=Path, default=Path("bench"))
    chosen = vars(parser.parse_args(arguments))
    signal.signal(signal.SIGTERM, _ended)
    out: Path = chosen.pop("out")
    options = Options(**chosen)
    try:
        options.resolved()
        parts = parts_of(name, options, folder_for(out))
    except InvalidValue as error:
        parser.error(str(error))
    try:
        record = run(entry, options, lambda line: print(line, flush=True), parts.keep)
    except KeyboardInterrupt:
        print(parts.left)
        return INTERRUPTED
    print(save(record, out / file_name(record)))
    parts.clear()
    return 0 if record.right else 1
