"""Make the notebooks of the recipes from their scripts, executed, with what they show.

python examples/make_notebooks.py            # all of them
python examples/make_notebooks.py logit_lens # one
python examples/make_notebooks.py --check    # write nothing; fail where a notebook is not what its script gives

The first picture of a notebook is written beside it, for ``examples/README.md``.

A script is cells: ``# %%`` begins one of code, ``# %% [markdown]`` one of prose in comments, and the docstring is the
first. What is written is the same each time on one machine: no times, no paths, ids from names.
"""

from __future__ import annotations

import base64
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import nbformat as _nbformat
import typer
from nbclient import NotebookClient
from rich.console import Console

nbformat: Any = _nbformat  # its functions have no types
HERE = Path(__file__).resolve().parent
FOLDER = HERE / "notebooks"

RECIPES = (
    "logit_lens",
    "steer_generated",
    "activation_patching",
    "ablate_direction",
    "probe_stop",
    "eight_branches",
    "sae_feature",
    "first_nan",
    "tool_call",
)

#: One thread, so that numbers are the same; and tqdm does not miss the widgets that nobody needs.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DJINN_CACHE_DIR": "off", "PYTHONWARNINGS": "ignore:IProgress not found"}

#: What must not stand in an output, for it would be another one elsewhere or the next time.
FLEETING = re.compile(r"0x[0-9a-f]{6,}|/(?:tmp|home|work|Users|root|usr)/|\b\d+(?:\.\d+)? ?(?:ms|us|seconds)\b")


def cells(source: str) -> Iterator[tuple[str, str]]:
    """The cells of a script: ``("markdown" | "code", text)``."""
    head, *rest = re.split(r"^# %%(.*)$", source, flags=re.MULTILINE)
    title, _, prose = head.split('"""')[1].partition("\n")
    yield "markdown", f"# {title.rstrip('.')}\n{prose.rstrip()}"
    for mark, text in zip(rest[::2], rest[1::2], strict=True):
        if "[markdown]" in mark:
            yield "markdown", re.sub(r"^# ?", "", text.strip("\n"), flags=re.MULTILINE).rstrip()
        else:
            yield "code", text.strip("\n")


def notebook(name: str) -> Any:
    """The notebook of a recipe, not executed."""
    made = nbformat.v4.new_notebook(metadata={"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    for index, (kind, text) in enumerate(cells(source)):
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        made.cells.append(new(text, id=f"{name.replace('_', '-')}-{index}"))
    return made


def execute(book: Any, folder: Path) -> Any:
    """Execute a notebook in place, in a kernel and a folder of its own, and keep of the outputs what stays the same.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    metadata = dict(book.metadata)
    NotebookClient(
        book,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])})
    book.metadata = nbformat.from_dict(metadata)  # not the version of the Python that happened to run it
    return book


def fleeting(book: Any) -> list[str]:
    """What stands in a notebook's outputs and must not: warnings, times, paths, addresses."""
    found = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output.get('text', output.get('ename'))}")
            texts = [output.get("text", ""), *(t for kind, t in output.get("data", {}).items() if "image" not in kind)]
            found += [f"{cell.id}: {match[0]!r}" for text in texts for match in FLEETING.finditer(text)]
    return found


def pictures(book: Any) -> list[bytes]:
    """The pictures among a notebook's outputs, as PNG."""
    data = [output.data for cell in book.cells for output in cell.get("outputs", ()) if "data" in output]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes; default: all.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; compare.")] = False,
) -> None:
    """Make the notebooks of the recipes."""
    console, differ = Console(), []
    for name in names or RECIPES:
        with console.status(name), tempfile.TemporaryDirectory() as folder:
            book = execute(notebook(name), Path(folder))
        if wrong := fleeting(book):
            raise SystemExit("\n".join([f"{name}: outputs that will not stay:", *wrong]))
        path, text = FOLDER / f"{name}.ipynb", nbformat.writes(book) + "\n"
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != text:
            differ.append(name)
        if not check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            for picture in pictures(book)[:1]:
                (FOLDER / f"{name}.png").write_bytes(picture)
        console.print(f"{name}: {'as it was' if old == text else 'another one'}, {len(text) / 1e3:.0f} kB")
    if check and differ:
        raise SystemExit(f"not what their scripts give: {', '.join(differ)}")


_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

if __name__ == "__main__":
    typer.run(main)
