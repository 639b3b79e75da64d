"""The rooms: imports point one way, and no file outgrows a reader."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("passes", "kernels", "runtime", "benchmarks")
FOUNDATION = ("errors", "sites", "specs", "when", "program", "views", "notebook", "_version")
LONGEST = 350

# Registered benchmarks that see the rooms from within, file by file: no public call replays one decode graph alone,
# compiles the same captured graph without cuts, or sends a row longer than the model's.
WITHIN = {"benchmarks.steps", "benchmarks.replays", "benchmarks.checkpoint", "benchmarks.copying"}

# Who may import whom. "face" is every other module of djinn_fx/, its __init__ among them.
MAY_IMPORT = {
    "foundation": {"foundation"},
    "kernels": {"foundation", "kernels"},
    "passes": {"foundation", "kernels", "passes"},
    "runtime": {"foundation", "kernels", "runtime"},
    "face": {"foundation", "kernels", "passes", "runtime", "face"},
    "benchmarks": {"foundation", "kernels", "face", "benchmarks"},
    "cli": {"foundation", "kernels", "passes", "runtime", "face", "benchmarks", "cli"},
    "tests": {"foundation", "kernels", "passes", "runtime", "face", "benchmarks", "scripts", "cli"},
    "scripts": {"foundation", "kernels", "passes", "runtime", "face", "benchmarks", "scripts"},
    "outside": {"foundation", "kernels", "passes", "runtime", "face"},
}


def room_of(module: str) -> str:
    """The room of a dotted module name; examples are outside."""
    package, _, rest = module.partition(".")
    if package != "djinn_fx":
        return "tests" if package == "tests" else "outside"
    head = rest.partition(".")[0]
    if head == "benchmarks" and (rest.endswith("_speed") or rest in WITHIN):
        return "scripts"  # they measure the rooms from within
    if head in ROOMS:
        return head
    if head == "__main__" or head.startswith("cli"):
        return "cli"
    return "foundation" if head in FOUNDATION else "face"


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each module that a source imports, in functions too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = base.startswith("djinn_fx")
                yield node.lineno, full if ours and is_module(full) else base


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module's imports breach, one line each."""
    room, short = room_of(module), module.rpartition(".")[2]
    found = []
    for line, target in imported(source, module, is_package=is_package):
        where = f"{module}:{line} imports {target}"
        if target.partition(".")[0] in ROOMS:
            found.append(f"{where}: say djinn_fx.{target}")
        if target.partition(".")[0] != "djinn_fx":
            continue
        if room_of(target) not in MAY_IMPORT[room]:
            found.append(f"{where}: {room} must not know {room_of(target)}")
        if room == "foundation" and target == "djinn_fx.program" and short != "program":
            found.append(f"{where}: {short} comes before program")
    return found


def sources() -> dict[str, Path]:
    """Every Python file of the project by module name, the rooms under their linked names."""
    files: dict[str, Path] = {}
    for folder in ("djinn_fx", *ROOMS, "examples", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            dotted = ".".join(parts).removesuffix(".__init__")
            files[f"djinn_fx.{dotted}" if folder in ROOMS else dotted] = path
    return files


def test_imports_point_one_way() -> None:
    files = sources()
    assert {"djinn_fx.errors", "djinn_fx.sites", "djinn_fx.specs", "djinn_fx.program"} <= set(files)
    found = [
        line
        for module, path in files.items()
        for line in violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_no_file_outgrows_a_reader() -> None:
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in sources().values()}
    too_long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LONGEST}
    assert not too_long, f"longer than {LONGEST} lines, cut them: {too_long}"


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_a_relative_link_without_init(room: str) -> None:
    link = ROOT / "djinn_fx" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..", room)
    assert not (ROOT / room / "__init__.py").exists()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("djinn_fx.errors", "import djinn_fx.passes.split"),
        ("djinn_fx.sites", "from djinn_fx import program"),
        ("djinn_fx.specs", "def f():\n    from .program import Program"),
        ("djinn_fx.program", "from djinn_fx.kernels import attention"),
        ("djinn_fx.program", "from djinn_fx import compile"),
        ("djinn_fx.kernels.attention", "from ..runtime import engine"),
        ("djinn_fx.kernels.attention", "from djinn_fx.passes import split"),
        ("djinn_fx.passes.split", "from djinn_fx.runtime.engine import Engine"),
        ("djinn_fx.passes.split", "from djinn_fx import Edit"),
        ("djinn_fx.runtime.engine", "import djinn_fx.passes.split as s"),
        ("djinn_fx.runtime.engine", "from djinn_fx.api import compile"),
        ("djinn_fx.api", "from djinn_fx.cli import app"),
        ("djinn_fx.benchmarks.decode", "from djinn_fx.cli import app"),
        ("djinn_fx.benchmarks.decode", "from djinn_fx.runtime.engine import Engine"),
        ("djinn_fx.api", "from djinn_fx.benchmarks import registry"),
        ("djinn_fx.benchmarks.decode", "from benchmarks import clock"),
        ("djinn_fx.benchmarks.decode", "from djinn_fx.benchmarks.replays import Replays"),
        ("djinn_fx.passes.split", "from passes.capture import capture"),
        ("examples.stop", "import kernels"),
        ("tests.test_x", "import runtime.engine"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("djinn_fx.program", "from djinn_fx.sites import Site\nfrom . import errors, specs"),
        ("djinn_fx.kernels.attention", "import torch\nfrom ..errors import InternalError"),
        ("djinn_fx.passes.split", "from .capture import capture\nfrom djinn_fx import errors"),
        ("djinn_fx.runtime.engine", "from djinn_fx.kernels.pack import pack"),
        ("djinn_fx.api", "from djinn_fx.passes import split\nfrom .runtime import engine"),
        ("djinn_fx.cli", "import djinn_fx\nfrom djinn_fx.api import compile"),
        ("djinn_fx.benchmarks.steps", "from djinn_fx.benchmarks.replays import Replays"),
        ("djinn_fx.benchmarks.replays", "from djinn_fx.runtime.loop import DecodeLoop"),
        ("examples.stop", "import djinn_fx as djinn"),
        ("tests.face.test_cli", "from djinn_fx.cli import app"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
