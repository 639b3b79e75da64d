"""Make the picture of a stop in a notebook for docs/notebooks.md: ``python docs/images/make_notebook.py``.

Needs Chromium and playwright. The same view is drawn on a light and on a dark ground.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import djinn_fx as djinn
from djinn_fx.bundled import storyteller

OUT = Path(__file__).with_name("notebook.png")
PROMPT = "It was a grey morning, and Mara felt sad. The sky above the slopes was stormy, and the air was full of"
GROUNDS = (("white", "#1a1a1a"), ("#14171b", "#dcdfe4"))


def main() -> None:
    """Write the picture."""
    model, tokenizer = storyteller()
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
    with dj.session() as s:
        point = djinn.break_at("resid_post.2", when=djinn.when.norm_above(27.0))
        view = next(s.generate(PROMPT, max_new_tokens=20, breakpoints=[point]))._repr_html_()
    sides = "".join(
        f'<div style="background:{ground};color:{ink};padding:16px 20px">{view}</div>' for ground, ink in GROUNDS
    )
    page = f'<!doctype html><body style="margin:0;display:grid;grid-template-columns:1fr 1fr">{sides}</body>'
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "view.html"
        path.write_text(page, encoding="utf-8")
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = chromium.new_page(viewport={"width": 1440, "height": 100})
        shown.goto(path.as_uri())
        shown.screenshot(path=OUT, full_page=True)
        chromium.close()
    print(OUT.name, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
