"""The debugger's commands on the bundled model, as a script gives them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.cli import app
from djinn_fx.debugger.commands import COMMANDS, complete
from djinn_fx.debugger.interpreter import Debugger

PROMPT = "It was a grey morning, and Mara felt sad."


@pytest.fixture(scope="module")
def dj() -> Iterator[djinn.Dj]:
    model, tokenizer = storyteller()
    with djinn.compile(model, tokenizer=tokenizer, max_length=128, verify=False) as compiled:
        yield compiled


@pytest.fixture
def out() -> list[str]:
    return []


@pytest.fixture
def debugger(dj: djinn.Dj, out: list[str]) -> Iterator[Debugger]:
    made = Debugger(dj, out.append, prompt=PROMPT, max_new_tokens=8)
    yield made
    made.close_sessions()


def test_a_script_breaks_steps_edits_and_goes_on(debugger: Debugger, out: list[str]) -> None:
    script = ["break resid_post.1 times 1", "run", "print position", "set h[-1] = 0", "step", "step token", "continue"]
    assert debugger.run_script(["# a comment", "", *script]) == 0
    text = "\n".join(out)
    assert "stopped after resid_post.1, prompt, position 10, token '.'" in text
    assert "norm 0.00  mean +0.000  min +0.00  max +0.00" in text
    assert "stopped after resid_post.2, prompt, position 10" in text
    assert "stopped after resid_post.2, generated, position 11" in text
    assert "finished: length, 8 tokens generated" in text


def test_commands_do_what_the_api_does(dj: djinn.Dj, debugger: Debugger) -> None:
    debugger.run_script(["break resid_post.1 times 1", "run", "set h *= -1", "continue"])
    with dj.session() as s:
        run = s.generate(PROMPT, max_new_tokens=8, breakpoints=[djinn.break_at("resid_post.1", times=1)])
        next(run).value.mul_(-1)
        assert torch.equal(run.result().tokens, debugger.run.tokens)


def test_the_echoed_lines_put_together_do_the_same(dj: djinn.Dj, debugger: Debugger, tmp_path: Path) -> None:
    out: list[str] = []
    debugger.write = out.append
    debugger.echo = True
    save_file({"d": torch.ones(dj.sites.get("resid_post.1").width)}, tmp_path / "d.safetensors")
    script = [
        "break resid_post.1 if norm > 5 and not mean > 9", "break resid_post.2 times 2", "run", "print norm",
        "fork 2", "switch 2", "set h[-1, 3] += norm * 2", f"steer resid_post.1 add {tmp_path}/d.safetensors 0.5",
        "continue", "unsteer resid_post.1", "delete 1", "continue", "continue", "switch 1", "delete", "set h = -h",
        "step", "continue", "rewind 14 resid_post.1", "set h /= 2", "lens", f"save {tmp_path}/a.safetensors",
        f"load {tmp_path}/a.safetensors", "continue", "diff 1 2", "nan",  "sites", "tokens",
    ]  # fmt: skip
    assert debugger.run_script(script) == 0, "\n".join(out)
    wanted = {number: session.tokens.tolist() for number, session in debugger.sessions.items()}
    printed = [line for line in out if line.startswith("tokens part")]
    debugger.close_sessions()

    import safetensors.torch

    space: dict[str, object] = {"dj": dj, "djinn": djinn, "torch": torch, "safetensors": safetensors}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec("\n".join(line[4:] for line in out if line.startswith(">>> ")), space)
    sessions = {number: space[f"s{number}"] for number in wanted}
    assert {number: s.tokens.tolist() for number, s in sessions.items() if isinstance(s, djinn.Session)} == wanted
    assert printed[0] in said.getvalue()
    for session in sessions.values():
        assert isinstance(session, djinn.Session)
        session.close()


def test_errors_say_what_to_do_and_lose_nothing(debugger: Debugger, out: list[str]) -> None:
    wrong = [
        "print h", "step", "frobnicate", "s", "break nowhere.3", "break resid_post.1 if layer > 1", "break",
    ]  # fmt: skip
    assert [debugger.execute(line) for line in wrong] == [False] * 6 + [True]
    assert out[-1] == "no breakpoints"
    assert debugger.execute("break resid_post.1") and debugger.execute("run")
    before = debugger.stop.value.clone()
    for line in ("set h[-1, 999] = 1", "set h = h[:, :2]", "set x = 1", "set h += 10**10**10", "print h.data",
                 "fork 99", "switch 7", "rewind 999", "load nothing.safetensors",
                 "steer resid_post.1 add none.safetensors",
                 "steer resid_post.1 scale x", "echo loud", "diff 1", "diff 1 9", "unsteer resid_post.1"):  # fmt: skip
        assert not debugger.execute(line), line
        assert out[-1].startswith("error: ")
    assert torch.equal(debugger.stop.value, before)
    assert debugger.execute("continue")


def test_breakpoints_come_and_go_in_a_run_and_its_forks(debugger: Debugger) -> None:
    debugger.run_script(["break resid_post.0", "run", "fork", "switch 2", "delete", "break resid_post.3 times 1"])
    assert debugger.execute("continue") and debugger.stop.site == "resid_post.3"
    assert debugger.execute("break resid_post.2")  # it has delivered its one stop, and goes on counting
    assert debugger.execute("continue") and (debugger.stop.site, debugger.stop.position) == ("resid_post.2", 11)
    assert debugger.execute("continue") and (debugger.stop.site, debugger.stop.position) == ("resid_post.2", 12)


def test_a_site_not_compiled_in_is_compiled_when_asked_for(debugger: Debugger, dj: djinn.Dj) -> None:
    assert debugger.run_script(["break mlp_out.1", "run"]) == 0
    assert debugger.stop.site == "mlp_out.1" and "mlp_out.1" in dj.compiled_sites


def test_an_interrupt_stops_at_the_next_step_and_keeps_the_run(debugger: Debugger) -> None:
    debugger.interruptible = True
    debugger.interrupt()
    assert debugger.execute("run") and debugger.stop.phase == "prompt"
    assert debugger.execute("continue") and debugger.run.finished


def test_diff_of_equal_and_of_parted_runs(dj: djinn.Dj) -> None:
    with dj.session() as a, dj.session() as b:
        runs = [s.generate(PROMPT, max_new_tokens=4) for s in (a, b)]
        dj.results(runs)
        same = djinn.diff(*runs, dj=dj)
        assert same.first_difference is None and all(place.kl == 0 for place in same.places)
        assert str(same).startswith("same tokens")
        b.generate(" The", max_new_tokens=2).run_to_end()
        assert a.run is not None and b.run is not None
        parted = djinn.diff(a.run, b.run, dj=dj)
        assert parted.first_difference == len(a.tokens)
        assert parted.places[-1].tokens[0] is None and parted.places[-1].kl is None


def test_names_usages_and_completion(debugger: Debugger, out: list[str]) -> None:
    assert debugger.execute("help") and all(command.name in out[-1] for command in COMMANDS)
    assert debugger.execute("help steer") and "ablate" in out[-1]
    assert complete("co", ()) == ["continue"]
    assert complete("break resid_post.1", ("resid_post.1", "resid_post.2")) == ["break resid_post.1"]
    assert not debugger.execute("se x") and not debugger.execute("st")


def test_the_command_line_runs_a_script(tmp_path: Path) -> None:
    script = tmp_path / "a.txt"
    script.write_text("break resid_post.1\nrun\nprint nonsense\nprint 1 + 1\nquit\nprint 7\n", encoding="utf-8")
    lenient = CliRunner().invoke(app, ["debug", "--script", str(script), "--max-new-tokens", "2"])
    assert lenient.exit_code == 1 and "(djinn) print 1 + 1\n2\n" in lenient.output and "print 7" not in lenient.output
    piped = CliRunner().invoke(app, ["debug", "--script", "-", "--strict"], input="print x\nhistory\n")
    assert piped.exit_code == 1 and "history" not in piped.output
    assert CliRunner().invoke(app, ["debug", "--script", str(tmp_path / "none")]).exit_code == 2
