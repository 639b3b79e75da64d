"""What a user installs: built, installed and imported far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("passes", "kernels", "runtime", "benchmarks")

IMPORT_ALL = """
import importlib, sys
from pathlib import Path
root = Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(root), (name, module.__file__)
print(*sys.argv[2:], sep="\\n")
"""


def python(*arguments: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run this interpreter in a fresh process and return what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tree_modules() -> set[str]:
    """The importable modules of the tree, by the names under which a user imports them."""
    names = {f"djinn_fx.{p.stem}" for p in ROOT.glob("djinn_fx/*.py") if p.stem != "__init__"}
    for room in ROOMS:
        files = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / room).rglob("*.py")]
        names |= {f"djinn_fx.{'.'.join(file.parts)}" for file in files if not file.stem.endswith("_speed")}
    return names - {"djinn_fx.__main__"}  # the scripts *_speed need a GPU's Triton


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    tmp = tmp_path_factory.mktemp("packaging")
    # A copy: setuptools writes into the tree it builds, and reads what an earlier build left.
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, tmp / "tree", symlinks=True, ignore=ignore)
    python("-m", "build", "--no-isolation", "--outdir", tmp / "dist", tmp / "tree", cwd=tmp)
    (sdist,) = (tmp / "dist").glob("djinn_fx-*.tar.gz")
    (wheel,) = (tmp / "dist").glob("djinn_fx-*.whl")
    return sdist, wheel


def test_wheel_imports_far_from_the_repository(built: tuple[Path, Path], tmp_path: Path) -> None:
    _, wheel = built
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    python(*pip, cwd=elsewhere)
    modules = sorted({"djinn_fx"} | tree_modules())
    printed = python("-c", IMPORT_ALL, target, *modules, cwd=elsewhere, path=target)
    assert printed.split() == modules
    assert python("-m", "djinn_fx", "--version", cwd=elsewhere, path=target).startswith("djinn-fx ")


def test_wheel_contents(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        (entry_points,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
        assert "djinn-fx = djinn_fx.cli:app" in archive.read(entry_points).decode()
    assert len(names) == len(set(names))
    assert "djinn_fx/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    # Nothing beside the package: no top-level `kernels`, no tests.
    assert {n.split("/")[0].split("-")[0] for n in names} == {"djinn_fx"}
    data = ROOT / "djinn_fx" / "data" / "storyteller"
    shipped = {p.relative_to(ROOT).as_posix() for p in data.glob("*") if p.is_file()}
    assert shipped <= set(names)


def test_sdist_names_no_machine(built: tuple[Path, Path]) -> None:
    machine = [f"{p}{os.sep}" for p in (ROOT, Path.home(), sys.prefix, built[0].parents[1])]
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
        files = {m.name: archive.extractfile(m) for m in members if m.isfile()}
        texts = {name: file.read() for name, file in files.items() if file is not None}
    assert all(m.isfile() or m.isdir() for m in members), "links do not survive every unpacker"
    assert not [n for n in texts if n.startswith(("/", "..")) or "/../" in n]
    found = [(n, p) for n, text in texts.items() for p in machine if p.encode() in text]
    assert not found, found


def test_the_root_shadows_no_package_named_like_a_room(tmp_path: Path) -> None:
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("theirs = True\n")
    # Started here, Python looks into the repository's root first.
    code = f"import {', '.join(ROOMS)}; print({', '.join(f'{room}.theirs' for room in ROOMS)})"
    assert python("-c", code, cwd=ROOT, path=tmp_path).split() == ["True"] * len(ROOMS)
