"""The debugger's screen, driven by Textual's pilot."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList, RichLog, Static

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.debugger.app import DebuggerApp

PROMPT = "It was a grey morning, and Mara felt sad."


@pytest.fixture(scope="module")
def dj() -> Iterator[djinn.Dj]:
    model, tokenizer = storyteller()
    with djinn.compile(model, tokenizer=tokenizer, max_length=256, verify=False) as compiled:
        yield compiled


class Screen:
    """The program under a pilot, as a user sees and drives it."""

    def __init__(self, app: DebuggerApp, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    async def settled(self) -> None:
        await self.app.workers.wait_for_complete()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.settled()

    async def say(self, line: str) -> None:
        self.app.query_one("#line", Input).value = line
        await self.press("enter")

    def shown(self, pane: str) -> str:
        return str(self.app.query_one(pane, Static).render())

    def layer(self, name: str) -> str:
        return str(self.app.query_one("#layers", OptionList).get_option(name).prompt)

    @property
    def log(self) -> str:
        return "\n".join(line.text for line in self.app.query_one("#log", RichLog).lines)


def drive(app: DebuggerApp, act: Callable[[Screen], Any], size: tuple[int, int] = (110, 40)) -> None:
    async def go() -> None:
        async with app.run_test(size=size) as pilot:
            await act(Screen(app, pilot))

    asyncio.run(go())


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
def test_lines_keys_and_panes(dj: djinn.Dj, size: tuple[int, int]) -> None:
    app = DebuggerApp(lambda tell: (dj, PROMPT), None, 4)

    async def act(screen: Screen) -> None:
        await screen.settled()
        assert "not running" in screen.shown("#tokens") and PROMPT in screen.shown("#tokens")
        await screen.press("ctrl+l", "down", "down", "enter")
        assert app.debugger is not None
        assert [point.text for point in app.debugger.points.values()] == ["resid_post.1"]
        await screen.press("ctrl+l")
        await screen.say("run")
        site = screen.shown("#value")
        for part in ("norm", "mean", "values", "largest", "lens", "resid_post.3", "moved", "rank"):
            assert part in site, part
        assert app.query_one("#site").border_title == "resid_post.1 · position 10 · prompt"
        assert screen.shown("#tokens").startswith("It was a grey morning")
        assert screen.layer("resid_post.1") == "●▶ resid_post.1"
        await screen.say("disable 1")
        assert screen.layer("resid_post.1") == "○▶ resid_post.1"
        await screen.say("steer resid_post.2 scale 0.5")
        assert screen.layer("resid_post.2") == "   resid_post.2 ~"
        await screen.say("print h.__class__")
        assert "error: column 1" in screen.log
        await screen.press("up")
        assert app.query_one("#line", Input).value == "print h.__class__"
        app.query_one("#line", Input).value = "con"
        await screen.press("tab")
        assert app.query_one("#line", Input).value == "continue "
        await screen.say("set h[-1, 3] /= 0")
        assert "1 Inf" in screen.shown("#value") and "not finite" in screen.shown("#value")
        await screen.say("delete")
        await screen.say("continue")
        assert app.debugger.run.finished and "not at a stop" in screen.shown("#value")
        await screen.say("quit")

    drive(app, act, size)
    assert app.return_code == 0


def test_an_empty_line_repeats_and_a_cursor_rewinds(dj: djinn.Dj) -> None:
    app = DebuggerApp(lambda tell: (dj, PROMPT), None, 8)

    async def act(screen: Screen) -> None:
        await screen.settled()
        await screen.press("enter")  # nothing to repeat
        for line in ("tbreak resid_post.1", "run", "next", "", ""):
            await screen.say(line)
        assert app.debugger is not None and app.debugger.stop.position == 13
        await screen.press("ctrl+t", "left", "left")
        assert "position 11" in str(app.query_one("#tokens").border_subtitle)
        await screen.press("enter")
        assert app.debugger.stop.position == 11
        await screen.press("left", "escape")
        assert app.query_one("#line").has_focus and not app.query_one("#tokens").border_subtitle

    drive(app, act)


def test_the_screen_is_there_while_the_model_is_opened(dj: djinn.Dj) -> None:
    go_on = threading.Event()

    def opening(tell: Callable[[str], None]) -> tuple[djinn.Dj, str]:
        tell("compiling it")
        assert go_on.wait(30)
        return dj, PROMPT

    app = DebuggerApp(opening, None)

    async def act(screen: Screen) -> None:
        for _ in range(100):
            await screen.pilot.pause(0.02)
            if "compiling it" in screen.shown("#busy"):
                break
        assert "compiling it" in screen.shown("#busy") and app.query_one("#busy").display
        app.query_one("#line", Input).value = "run"
        await screen.pilot.press("enter", "tab", "up", "ctrl+c")
        await screen.pilot.pause()
        assert "still compiling it" in screen.log and app.query_one("#line", Input).value == "run"
        go_on.set()
        await screen.settled()
        await screen.press("enter")
        assert app.debugger is not None and app.debugger.run.finished

    drive(app, act)


def test_what_cannot_be_opened_ends_the_program_with_its_reason() -> None:
    def opening(tell: Callable[[str], None]) -> tuple[djinn.Dj, str]:
        raise OSError("no such model")

    app = DebuggerApp(opening, None)

    async def act(screen: Screen) -> None:
        for _ in range(100):
            await screen.pilot.pause(0.02)
            if app.unopened:
                break

    drive(app, act)
    assert app.return_code == 2 and app.unopened == "OSError: no such model"


@pytest.fixture
def long_step(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set in the middle of a run, in a step that takes until the run is asked to stop."""
    long_step, iterate = threading.Event(), dj.engine.iterate

    def slow(runs: list[djinn.Run]) -> list[djinn.Stop]:
        if len(runs[0].session.tokens) > 20 and not long_step.is_set():
            long_step.set()  # a step that takes until somebody has asked
            for _ in range(2000):
                if runs[0].interrupted:
                    break
                time.sleep(0.005)
        return iterate(runs)

    monkeypatch.setattr(dj.engine, "iterate", slow)
    return long_step


async def begin(screen: Screen, long_step: threading.Event) -> None:
    await screen.settled()
    screen.app.query_one("#line", Input).value = "run"
    await screen.pilot.press("enter")
    for _ in range(400):
        await screen.pilot.pause(0.005)
        if long_step.is_set():
            break


def test_ctrl_c_stops_a_run_and_keeps_it(dj: djinn.Dj, long_step: threading.Event) -> None:
    app = DebuggerApp(lambda tell: (dj, PROMPT), None, 200)

    async def act(screen: Screen) -> None:
        await begin(screen, long_step)
        await screen.press("ctrl+c")
        assert app.debugger is not None
        assert "interrupted: stopped after" in screen.log
        assert len(app.debugger.session.tokens) == 21 and not app.debugger.run.finished
        assert app.debugger.stop.phase == "generated"
        await screen.say("continue")
        tokens = app.debugger.session.tokens.tolist()
        await screen.say("quit")
        with dj.session() as s:
            assert s.generate(PROMPT, max_new_tokens=200).result().tokens.tolist() == tokens

    drive(app, act)


def test_leaving_in_the_middle_of_a_run(long_step: threading.Event) -> None:
    model, tokenizer = storyteller()
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=64, verify=False)
    iterate = dj.engine.iterate

    def slow(runs: list[djinn.Run]) -> list[djinn.Stop]:
        long_step.set()
        time.sleep(0.05)
        return iterate(runs)

    dj.engine.iterate = slow  # type: ignore[method-assign, assignment]
    app = DebuggerApp(lambda tell: (dj, PROMPT), None, 40)

    async def act(screen: Screen) -> None:
        await begin(screen, long_step)
        await screen.pilot.press("ctrl+q")

    drive(app, act)
    app.close()
    with pytest.raises(djinn.SessionClosed):
        dj.session()
