"""The debugger's screen, driven by Textual's pilot."""

from __future__ import annotations

import asyncio

import pytest
from textual.widgets import Input, OptionList, RichLog, Static

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.debugger.app import DebuggerApp


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
def test_lines_keys_and_panes(size: tuple[int, int]) -> None:
    model, tokenizer = storyteller()
    with djinn.compile(model, tokenizer=tokenizer, max_length=64, verify=False) as dj:
        app = DebuggerApp(dj, "It was a grey morning, and Mara felt sad.", 4)
        asyncio.run(_converse(app, size))


async def _converse(app: DebuggerApp, size: tuple[int, int]) -> None:
    async with app.run_test(size=size) as pilot:

        async def say(line: str) -> None:
            app.query_one("#line", Input).value = line
            await pilot.press("enter")
            await app.workers.wait_for_complete()
            await pilot.pause()

        def shown(pane: str) -> str:
            return str(app.query_one(pane, Static).render())

        assert "not running" in shown("#tokens")
        await pilot.press("ctrl+l", "down", "down", "enter")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert [point.text for point in app.debugger.points.values()] == ["resid_post.1"]
        await pilot.press("ctrl+l")
        await say("run")
        assert "stopped after resid_post.1" in shown("#site") and "[.]" in shown("#tokens")
        assert "o> resid_post.1" in str(app.query_one("#layers", OptionList).get_option("resid_post.1").prompt)
        await say("print h.__class__")
        log = "\n".join(line.text for line in app.query_one("#log", RichLog).lines)
        assert "error: column 1" in log
        await pilot.press("up")
        assert app.query_one("#line", Input).value == "print h.__class__"
        app.query_one("#line", Input).value = "con"
        await pilot.press("tab")
        assert app.query_one("#line", Input).value == "continue "
        await say("delete")
        await say("continue")
        assert app.debugger.run.finished
        await say("quit")
    assert app.return_code == 0
