"""Make the picture of the debugger for the README: ``python docs/images/make_debugger.py``.

Needs Chromium and playwright. It is the real program, on the bundled model, driven through Textual's pilot.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from functools import partial
from pathlib import Path

from playwright.sync_api import sync_playwright
from textual.widgets import Input

from djinn_fx.debugger.app import DebuggerApp
from djinn_fx.debugger.opening import open_model

OUT = Path(__file__).with_name("debugger.png")
SIZE = (108, 36)
LINES = (
    "break resid_post.1 if norm > 12", "run", "disable 1", "next 14", "fork", "enable 1", "switch 2",
    "set h[-1] *= -1", "print topk(unembed(h[-1]), 3).values",
)  # fmt: skip
TYPED = "continue"


async def drawn() -> str:
    """The screen after some commands, as SVG."""
    app = DebuggerApp(partial(open_model, None), None, 24)
    async with app.run_test(size=SIZE) as pilot:
        await app.workers.wait_for_complete()
        for text in LINES:
            app.query_one("#line", Input).value = text
            await pilot.press("enter")
            await app.workers.wait_for_complete()
            await pilot.pause()
        line = app.query_one("#line", Input)
        line.value, line.cursor_position = TYPED, len(TYPED)
        await pilot.pause()
        svg = app.export_screenshot(title="djinn-fx debug")
    app.close()
    return svg


def main() -> None:
    """Write the picture."""
    svg = re.sub(r"@font-face\s*\{.*?\}", "", asyncio.run(drawn()), flags=re.DOTALL)  # no font from the network
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": 1400, "height": 1100}, device_scale_factor=1.5)
        view.set_content(f"<body style='margin:0'>{svg}</body>")
        view.locator("svg").first.screenshot(path=OUT, omit_background=True)
        chromium.close()
    print(OUT.name, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
