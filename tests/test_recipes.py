"""The recipes: each notebook is its script, is executed without a fault, and shows nothing that will not stay."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from nbclient.exceptions import CellExecutionError

from examples.make_notebooks import FOLDER, HERE, RECIPES, cells, execute, fleeting, nbformat, notebook, pictures


def stored(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def said(book: Any) -> str:
    """All that a notebook's cells printed."""
    return "".join(o.text for cell in book.cells for o in cell.get("outputs", ()) if o.output_type == "stream")


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every recipe's notebook, executed one after the other in one kernel, whose names are forgotten in between.

    To start a kernel and import torch takes longer than most recipes.
    """
    whole, books = nbformat.v4.new_notebook(metadata=notebook(RECIPES[0]).metadata), {}
    for name in RECIPES:
        books[name] = notebook(name)
        forget = nbformat.v4.new_code_cell("%reset -f", id=f"forget-{name.replace('_', '-')}")
        whole.cells += [forget, *books[name].cells]
    for cell in whole.cells:
        cell.metadata["tags"] = ["raises-exception"]  # go on: the test of each recipe looks at its own cells
    execute(whole, tmp_path_factory.mktemp("notebooks"))
    return books


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_notebook_is_executed(executed: dict[str, Any], name: str) -> None:
    assert fleeting(executed[name]) == []
    code = [cell for cell in executed[name].cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and said(executed[name])
    before, now = (re.sub(r"[-+\d.,%]+", "#", said(book)) for book in (stored(name), executed[name]))
    assert before.count("\n") == now.count("\n"), "it says as many lines as when it was made"


@pytest.mark.parametrize("name", RECIPES)
def test_a_stored_notebook_is_its_script(name: str) -> None:
    made, kept = notebook(name), stored(name)
    nbformat.validate(kept)
    assert [(c.id, c.cell_type, c.source) for c in kept.cells] == [(c.id, c.cell_type, c.source) for c in made.cells]
    assert kept.metadata == made.metadata
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "executed once, in order"
    assert fleeting(kept) == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000


def test_every_recipe_is_here_and_indexed() -> None:
    scripts = {path.stem for path in HERE.glob("*.py") if re.search(r"^# %%", path.read_text("utf-8"), re.MULTILINE)}
    scripts -= {"make_notebooks"}
    assert scripts == set(RECIPES) == {path.stem for path in FOLDER.glob("*.ipynb")}
    index = (HERE / "README.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"]({name}.py)" in index and f"](notebooks/{name}.ipynb)" in index
        for picture in pictures(stored(name))[:1]:
            assert (FOLDER / f"{name}.png").read_bytes() == picture and f"](notebooks/{name}.png)" in index
    for target in re.findall(r"\]\(([^)#]+)\)", index):
        assert "://" in target or (HERE / target).exists(), target


def test_what_the_index_quotes_was_said() -> None:
    everything = "".join(said(stored(name)) for name in RECIPES)
    index = (HERE / "README.md").read_text(encoding="utf-8")
    quoted = [
        line
        for block in re.findall(r"^```text\n(.*?)^```", index, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert len(quoted) > len(RECIPES) - 2
    for line in quoted:
        assert line.rstrip(" .…").strip() in everything, line


def test_a_script_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    path = HERE / "logit_lens.py"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "__main__"})
    plt.close("all")
    assert len(out.getvalue().splitlines()) > 5
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


# -- the maker ---------------------------------------------------------------------------------

SCRIPT = '''"""A title.

Some prose.
"""

# ruff: noqa: B018 (dropped)

# %%
x = 1
print(f"{x} # %% not a cell")

# %% [markdown]
# ## A head
#
# Text, `code`.


# %%
def f() -> None:
    """Inner."""


x
'''


def test_cells_of_a_script() -> None:
    assert list(cells(SCRIPT)) == [
        ("markdown", "# A title\n\nSome prose."),
        ("code", 'x = 1\nprint(f"{x} # %% not a cell")'),
        ("markdown", "## A head\n\nText, `code`."),
        ("code", 'def f() -> None:\n    """Inner."""\n\n\nx'),
    ]


@pytest.mark.parametrize("text", ["<f at 0x7f12ab34cd56>", "/tmp/xyz/a", "took 12.5 ms", "3 seconds"])
def test_what_will_not_stay_is_seen(text: str) -> None:
    for output in (
        nbformat.v4.new_output("stream", text=text),
        nbformat.v4.new_output("execute_result", {"text/html": text}),
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
    ):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
        assert len(fleeting(book)) == 1


def test_a_failing_cell_stops_the_maker(tmp_path: Path) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert False, 'here'")])
    with pytest.raises(CellExecutionError, match="here"):
        execute(book, tmp_path)
