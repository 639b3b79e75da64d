"""The debugger without a screen: a script word for word, Ctrl-C, and scripts that cannot be read; with one: tmux."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.cli import app
from djinn_fx.debugger.interpreter import Debugger
from djinn_fx.debugger.terminal import interruptible, show

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PROMPT = "It was a grey morning, and Mara felt sad."


@pytest.fixture(scope="module")
def dj() -> Iterator[djinn.Dj]:
    model, tokenizer = storyteller()
    with djinn.compile(model, tokenizer=tokenizer, max_length=256, verify=False) as compiled:
        yield compiled


@pytest.mark.skipif(not str(torch.__version__).startswith("2.13"), reason="golden text was made with torch 2.13")
def test_a_script_is_as_it_was(dj: djinn.Dj) -> None:
    """After a change that is meant: ``DJINN_GOLDEN=write pytest tests/face/test_debugger_terminal.py``."""
    out: list[str] = []
    debugger = Debugger(dj, out.append, prompt=PROMPT, max_new_tokens=12, echo=True)
    script = (GOLDEN / "debugger.script").read_text(encoding="utf-8")
    assert debugger.run_script(script.splitlines()) == 1  # it holds a mistake
    shown = "\n".join(line.rstrip() for line in "\n".join(out).splitlines()) + "\n"
    path = GOLDEN / "debugger.txt"
    if os.environ.get("DJINN_GOLDEN") == "write":
        path.write_text(shown, encoding="utf-8")
    assert shown == path.read_text(encoding="utf-8")


def test_what_a_model_says_does_not_steer_the_terminal(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dj.engine.tokenizer, "decode", lambda *_, **__: "\x1b[2J\x9b red \u202e\r")
    debugger = Debugger(dj, show, prompt=PROMPT, max_new_tokens=2)
    assert debugger.run_script(["run", "tokens", "lens"]) in (0, 1)
    said = capsys.readouterr().out
    assert "\\x1b[2J\\x9b red \\u202e\\r" in said
    assert not {"\x1b", "\x9b", "\u202e", "\r"} & set(said)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_the_run_of_a_script_and_keeps_it(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    with dj.session() as s:
        whole = s.generate(PROMPT, max_new_tokens=100).result().tokens.tolist()
    iterate, pressed = dj.engine.iterate, 0

    def pressing(runs: list[djinn.Run]) -> list[djinn.Stop]:
        nonlocal pressed
        if len(runs[0].session.tokens) >= 20 and pressed < times:
            pressed += 1
            os.kill(os.getpid(), signal.SIGINT)  # as a terminal does, in the middle of the run
            if times == 2:
                pressed += 1
                os.kill(os.getpid(), signal.SIGINT)  # out of patience: the command is given up
        return iterate(runs)

    monkeypatch.setattr(dj.engine, "iterate", pressing)
    out: list[str] = []
    debugger = Debugger(dj, out.append, prompt=PROMPT, max_new_tokens=100)
    with interruptible(debugger):
        if times == 2:
            with pytest.raises(KeyboardInterrupt):
                debugger.run_script(["run", "print position"])
        else:
            assert debugger.run_script(["run", "print position"]) == 0
            assert "interrupted: stopped after resid_post.0, generated, position 19" in "\n".join(out)
            assert out[-1] == "19"
    assert not debugger.run.finished
    while not debugger.run.finished:
        assert debugger.execute("continue")
    assert debugger.session.tokens.tolist() == whole
    debugger.close_sessions()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no script"),
        ("folder", "is a folder"),
        (b"", "holds no command"),
        (b"\n# only words\n\n", "holds no command"),
        (b"run\nbreak \xff\xfe\n", "is no UTF-8 text: line 2, byte 10"),
    ],
)
def test_a_script_that_cannot_be_read(tmp_path: Path, content: bytes | str | None, said: str) -> None:
    path = tmp_path / "script"
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    result = CliRunner().invoke(app, ["debug", "--script", str(path)])
    assert result.exit_code == 2 and said in result.output, result.output
    assert "Traceback" not in result.output


def test_standard_input_that_is_no_text() -> None:
    result = CliRunner().invoke(app, ["debug", "--script", "-"], input=b"\xff")
    assert result.exit_code == 2 and "the script - is no UTF-8 text" in result.output


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["debug", str(tmp_path / "none"), "--script", "-"], input="run\n")
    assert result.exit_code == 2 and "none" in result.output


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_in_a_real_terminal(tmp_path: Path) -> None:
    socket = tmp_path / "tmux"
    program = f'{sys.executable} -W ignore -c "from djinn_fx.cli import app; app()"'
    command = f"env -u COLUMNS -u LINES {program} debug --max-new-tokens 6"

    def tmux(*words: str) -> str:
        done = subprocess.run(["tmux", "-S", str(socket), *words], capture_output=True, text=True, check=True)
        return done.stdout

    def wait_for(*parts: str, seconds: float = 60) -> str:
        end, screen = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            screen = tmux("capture-pane", "-p", "-t", "djinn")
            if all(part in screen for part in parts):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"no {parts} in\n{screen}")

    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "DJINN_CACHE_DIR": "off", "TERM": "xterm-256color"}
    given = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
    tmux(
        "-f", "/dev/null", "new-session", "-d", "-s", "djinn", "-x", "110", "-y", "40", *given, "-c", str(ROOT), command
    )
    try:
        wait_for("not running", "resid_post.3")
        tmux("send-keys", "-t", "djinn", "b resid_post.1 times 1", "Enter")
        wait_for("breakpoint 1 at resid_post.1")
        tmux("send-keys", "-t", "djinn", "r", "Enter")
        screen = wait_for("resid_post.1 · position 10 · prompt", "moved", "●▶ resid_post.1")
        assert "norm 14.41" in screen and "' She'" in screen
        tmux("send-keys", "-t", "djinn", "c", "Enter")
        wait_for("finished: length, 6 tokens generated")
        tmux("send-keys", "-t", "djinn", "C-q")
        for _ in range(100):
            alive = subprocess.run(["tmux", "-S", str(socket), "has-session"], capture_output=True, check=False)
            if alive.returncode:
                break
            time.sleep(0.1)
        assert alive.returncode, "the program did not end"
    finally:
        subprocess.run(["tmux", "-S", str(socket), "kill-server"], capture_output=True, check=False)
