"""Golden text: what ``djinn-fx inspect`` shows of two models, whole.

The files in ``golden/`` are compared word for word. After a change that is meant, write them anew and read the diff:

    DJINN_GOLDEN=write python -m pytest tests/inspecting/test_golden.py

Another version of torch may export other graphs, so they are compared with the version that they were made with only.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from djinn_fx.inspecting.text import Asked, render
from tests.inspecting.subjects import trace

GOLDEN = Path(__file__).parent / "golden"
TORCH = "2.13"

pytestmark = pytest.mark.skipif(
    not str(torch.__version__).startswith(TORCH), reason=f"golden text was made with torch {TORCH}"
)


@pytest.mark.parametrize("name", ["storyteller", "llama-4"])
@pytest.mark.parametrize(
    ("part", "asked"),
    [
        ("annotated", Asked(after="roles")),
        ("steer-diff", Asked(after="steer", diff=True)),
        ("yields", Asked(after="yields")),
        ("layer-2", Asked(after="yields", layer=2)),
        ("site", Asked(after="steer", site="resid_post.*")),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_text_is_as_it_was(name: str, part: str, asked: Asked) -> None:
    path = GOLDEN / f"{name}-{part}.txt"
    shown = "\n".join(line.rstrip() for line in render(trace(name), asked).splitlines()) + "\n"
    if os.environ.get("DJINN_GOLDEN") == "write":
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8"), f"{path.name} differs; see the head of this file"
