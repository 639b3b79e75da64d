"""Every Python block of the README and the how-to pages runs, in order, as a reader would run it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import djinn_fx as djinn

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path) -> str:
    """The page's Python blocks as one program; line numbers match the page's."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        first = text.count("\n", 0, match.start(1))
        for offset, line in enumerate(match[1].splitlines()):
            lines[first + offset] = line
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page).strip()], ids=lambda page: page.name)
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks(page), str(page), "exec"), names)
    assert "djinn" in names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_is_on_its_page_with_its_default() -> None:
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    cells = [row.split(" | ") for row in re.findall(r"^\| (`.*)$", text, re.MULTILINE)]
    rows = {name: row[1] for row in cells for name in re.findall(r"`(\w+)`", row[0])}
    for name, parameter in inspect.signature(djinn.compile).parameters.items():
        if name == "model":
            continue
        assert name in rows, name
        if isinstance(parameter.default, (bool, str)) or (
            isinstance(parameter.default, int) and name != "pinned_bytes"
        ):
            assert re.search(rf"\b{parameter.default}\b", rows[name]), rows[name]
