"""Make the picture of the page of ``djinn-fx inspect`` for the README: ``python docs/images/make_inspect.py``.

Needs Chromium and playwright. The model is small and random: a llama of 32 layers, measured on this machine.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from playwright.sync_api import sync_playwright
from transformers import LlamaConfig

from djinn_fx.inspecting.making import Choice, hollow, subject, trace_of
from djinn_fx.inspecting.measuring import measure
from djinn_fx.inspecting.page import page

OUT = Path(__file__).with_name("inspect.png")


def main() -> None:
    """Write the picture."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    choice = Choice()
    what = subject("llama, 32 layers", hollow(config), choice)
    trace = trace_of(what, choice)
    trace = replace(trace, costs=measure(what, choice, "eager", print))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        path.write_text(page(trace), encoding="utf-8")
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 1440, "height": 820})
        view.goto(path.as_uri())
        view.keyboard.press("/")
        view.keyboard.type("resid_post.6")
        view.keyboard.press("Enter")
        view.screenshot(path=OUT)
        chromium.close()
    print(OUT.name, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
