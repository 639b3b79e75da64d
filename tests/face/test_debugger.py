"""The debugger's commands on the bundled model, as a script gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.cli import app
from djinn_fx.debugger.commands import COMMANDS, again, complete, find
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
    assert "norm 0, mean +0, min +0, max +0" in text
    assert "stopped after resid_post.2, prompt, position 10" in text
    assert "stopped after resid_post.2, generated, position 11" in text
    assert "finished: length, 8 tokens generated" in text


def test_commands_do_what_the_api_does(dj: djinn.Dj, debugger: Debugger) -> None:
    debugger.run_script(["break resid_post.1 times 1", "run", "set h *= -1", "continue"])
    with dj.session() as s:
        run = s.generate(PROMPT, max_new_tokens=8, breakpoints=[djinn.break_at("resid_post.1", times=1)])
        next(run).value.mul_(-1)
        assert torch.equal(run.result().tokens, debugger.run.tokens)


def test_errors_say_what_to_do_and_lose_nothing(debugger: Debugger, out: list[str]) -> None:
    wrong = [
        "print h", "step", "frobnicate", "st", "break nowhere.3", "break resid_post.1 if layer > 1", "break",
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


def test_a_temporary_breakpoint_goes_once_it_was_hit(debugger: Debugger, out: list[str]) -> None:
    assert (
        debugger.run_script(["tbreak resid_post.1", "break resid_post.3 if norm > 1e9", "run", "info breakpoints"]) == 0
    )
    assert "breakpoint 1: stopped after resid_post.1" in "\n".join(out)
    assert list(debugger.points) == [2] and "keep  on   resid_post.3 if norm > 1e9" in out[-1]
    assert debugger.execute("fork") and debugger.execute("switch 2")  # gone for forks too
    assert debugger.execute("continue") and debugger.run.finished


def test_breakpoints_are_disabled_enabled_and_counted(debugger: Debugger, out: list[str]) -> None:
    script = ["b resid_post.1", "b resid_post.2 if h[0] > 1e9", "r", "c", "i b", "disable 1", "i b", "c"]
    assert debugger.run_script(script) == 0
    assert "1   keep  on   resid_post.1  hit 2 times\n2   keep  on   resid_post.2 if h[0] > 1e9" in "\n".join(out)
    assert "1   keep  off  resid_post.1  hit 2 times" in "\n".join(out)
    assert debugger.run.finished
    assert debugger.execute("rewind 12") and debugger.execute("enable") and debugger.execute("continue")
    assert debugger.stop.site == "resid_post.1"
    for wrong in (
        "enable 7",
        "disable x",
        "delete 1 9",
        "tbreak",
        "info",
        "info nothing",
        "break resid_post.1 if h[999]",
    ):
        assert not debugger.execute(wrong), wrong
    assert list(debugger.points) == [1, 2]
    assert debugger.execute("delete 1 2") and not debugger.points


def test_info_tells_of_sessions_sites_and_edits(debugger: Debugger, out: list[str]) -> None:
    debugger.run_script(["b resid_post.1", "r", "steer resid_post.2 scale 0.5", "fork", "i s"])
    assert "*1  at resid_post.1, position 10  steered: resid_post.2" in out[-1] and " 2  at resid_post.1" in out[-1]
    assert debugger.execute("info edits") and out[-1] == "resid_post.2: scale=0.5"
    assert debugger.execute("info site")
    assert "resid_post.1  [tokens, 128] float32" in out[-1] and "breakpoints 1" in out[-1] and "largest  " in out[-1]
    assert debugger.execute("i si blocks.0.hook_mlp_out") and "mlp_out.0" in out[-1] and "not compiled in" in out[-1]


def test_short_forms_steps_and_what_an_empty_line_repeats(debugger: Debugger) -> None:
    assert debugger.run_script(["tb resid_post.0", "r", "s 2"]) == 0
    third = debugger.dj.compiled_sites[2]
    assert (debugger.stop.site, debugger.stop.position) == (third, 10)
    assert debugger.run_script(["n 3", "p position"]) == 0
    assert (debugger.stop.site, debugger.stop.position) == (third, 13)
    assert again(debugger.history) == ""
    assert debugger.execute("n") and again(debugger.history) == "n"
    assert again([]) == "" and again(["frobnicate"]) == ""
    assert debugger.execute("next 99") and debugger.run.finished
    assert not debugger.execute("s 0") and not debugger.execute("s x")


def test_help_gives_an_example_of_each_command_that_can_be_read(debugger: Debugger, out: list[str]) -> None:
    for command in COMMANDS:
        assert debugger.execute(f"help {command.name}")
        assert command.examples and all(f"    {example}" in out[-1] for example in command.examples)
        assert all(find(example.split()[0]) is command for example in command.examples)
    assert debugger.execute("h b") and "(short: b)" in out[-1]


def test_diff_nan_and_lens_see_the_session_as_it_is(debugger: Debugger, out: list[str]) -> None:
    debugger.run_script(["b resid_post.1 times 1", "r", "fork", "set h[-1] *= -3", "lens"])
    edited = out[-1]
    debugger.run_script(["switch 2", "lens", "diff 1 2"])
    assert edited != out[-3] and edited.splitlines()[0] == out[-3].splitlines()[0]
    rows = out[-1].splitlines()
    assert rows[0] == "same tokens" and float(rows[-1].split()[-1]) > 0.01 and float(rows[-2].split()[-1]) == 0
    assert debugger.execute("nan") and out[-1] == "all finite"
    assert debugger.execute("set h[-1, 3] /= 0") and debugger.execute("nan")
    assert out[-1] == "first non-finite: resid_post.1, position 10"
    assert debugger.execute("lens") and "not finite" in out[-1]
    assert debugger.execute("diff 1 2") and out[-1].split()[-1] == "nan"


@pytest.mark.parametrize("content", [b"", b"\x00\x01 no safetensors", b"\xff" * 64, b"\x08" + bytes(7) + b"{}      "])
def test_a_damaged_file_loses_nothing(debugger: Debugger, out: list[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert debugger.run_script(["b resid_post.1", "r"]) == 0
    for line in (f"steer resid_post.1 add {path}", f"steer resid_post.1 ablate {path}", f"load {path}",
                 f"steer resid_post.1 add {tmp_path}", f"load {tmp_path}", f"save {tmp_path}/no/a.file", "save .",
                 "save /"):  # fmt: skip
        assert not debugger.execute(line) and out[-1].startswith("error: "), line
        assert "defect" not in out[-1], out[-1]
    assert debugger.execute("continue")


def test_what_nobody_foresaw_does_not_end_the_program(
    debugger: Debugger, out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a test")

    monkeypatch.setattr(debugger.dj, "memory", fail)
    assert not debugger.execute("memory")
    assert "ZeroDivisionError: a test" in out[-1] and "Please report it" in out[-1] and djinn.__version__ in out[-1]
    assert "asking.py:" in out[-1]


def test_a_run_that_cannot_begin_leaves_what_was_there(debugger: Debugger) -> None:
    assert debugger.run_script(["b resid_post.1", "r"]) == 0
    stop = debugger.stop
    assert not debugger.execute("run " + "and so on " * 200)
    assert debugger.stop is stop and debugger.execute("continue")


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
        assert str(parted).startswith(f"same tokens up to position {len(a.tokens)}, where the first run ends\n")


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


def test_a_rewind_says_where_it_went_and_what_it_dropped(debugger: Debugger, out: list[str]) -> None:
    debugger.run_script(
        ["b resid_post.1", "r", "set h[-1] *= 2", "c", "steer resid_post.2 scale 0.5", "set h += 1", "c"]
    )
    assert debugger.execute("rewind 11")
    assert "rewound to position 11; dropped: position 12, the edit of resid_post.1 (position 11)" in out[-2]
    assert "the steering of resid_post.2" in out[-2] and "positions 0 to 10" not in out[-2]
    assert debugger.execute("rewind 4 resid_post.0")
    assert "rewound to position 4, in the prompt's step, which computes positions 0 to 10 together" in out[-2]
    assert "dropped: position 11, the edit of resid_post.1 (positions 0 to 10)" in out[-2]
    assert debugger.execute("rewind 4") and out[-2].endswith("dropped: nothing")


def test_steer_and_rewind_compile_in_what_they_need(debugger: Debugger, out: list[str]) -> None:
    debugger.run_script(["tb resid_post.1", "r", "echo on"])
    for line in ("steer mlp_out.3 scale 0.5", "rewind 3 attn_out.2"):
        site = line.split()[1] if line.startswith("steer") else line.split()[2]
        assert site not in debugger.dj.compiled_sites
        assert debugger.execute(line), out[-1]
        assert site in debugger.dj.compiled_sites and f">>> dj.add_sites([{site!r}])" in out
    assert debugger.stop.site == "attn_out.2" and debugger.execute("continue")


def test_an_unknown_name_is_told_every_known_one(debugger: Debugger, out: list[str]) -> None:
    debugger.run_script(["tb resid_post.1", "r"])
    assert not debugger.execute("p foo")
    for known in ("norm", "mean", "unembed", "position", "functions: abs, argmax", "cosine", "topk"):
        assert known in out[-1]
    assert not debugger.execute("p topk") and "'topk' is a function here" in out[-1]


def test_words_that_the_model_does_not_know_are_named(debugger: Debugger, out: list[str]) -> None:
    assert debugger.execute("run It was a grey quantum morning, and Zaphod felt sad.")
    assert "note: the model does not know 'quantum', 'Zaphod'" in "\n".join(out)
    out.clear()
    assert debugger.execute(f"run {PROMPT}") and "does not know" not in "\n".join(out)


@pytest.mark.parametrize("arguments", [["debug", "{}", "--script", "-"], ["demo", "--model", "{}"], ["inspect", "{}"]])
def test_a_model_that_is_not_there_is_told_its_neighbours(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "gpt2-small").mkdir()
    wrong = str(tmp_path / "gpt2-smal")
    told = CliRunner().invoke(app, [word.format(wrong) for word in arguments], input="run\n")
    text = "".join(told.output.split())  # lines are broken anywhere
    assert told.exit_code == 2 and f"InvalidValue:nomodel'{wrong}':nearest:{wrong}l.Builtin:" in text


def test_a_checkpoint_of_other_sites_is_loaded_where_that_is_meant(
    dj: djinn.Dj, debugger: Debugger, out: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    assert debugger.run_script(["b resid_post.1", "r", f"save {path}"]) == 0
    new = next(name for name in ("mlp_act.3", "attn_z.3", "attn_q.3") if name not in dj.compiled_sites)
    assert debugger.execute(f"b {new}")
    assert not debugger.execute(f"load {path}") and out[-1].endswith(f"`load {path} anyway`.")
    assert debugger.execute(f"load {path} anyway") and out[-1].splitlines()[-1].startswith("*2")
    assert debugger.execute("continue")


def test_a_prompts_stop_says_where_the_condition_held(debugger: Debugger, out: list[str]) -> None:
    assert debugger.run_script(["b resid_post.1 if h[0] > 1e9 or h[0] < 9", "r"]) == 0
    assert "breakpoint 1: stopped after" in out[-1]  # at every position: nothing to tell
    assert debugger.run_script(["delete", "rewind 0 resid_post.0", "p h.float().norm(dim=-1).argmax()"]) == 0
    at, most = out[-1], float(debugger.stop.value.norm(dim=-1).max())
    assert debugger.run_script([f"b resid_post.0 if norm >= {most - 1e-3}", "r"]) == 0
    assert f"which held at position {at}: stopped after resid_post.0, prompt, position 10" in out[-1]


def test_what_stands_behind_a_command_that_takes_nothing_is_refused(debugger: Debugger, out: list[str]) -> None:
    assert debugger.run_script(["b resid_post.1", "r"]) == 0
    for line in ("continue 5", "quit now", "unsteer"):
        assert not debugger.execute(line) and "defect" not in out[-1]
    assert not debugger.done and debugger.stop.site == "resid_post.1"


def test_a_rewind_to_where_a_site_keeps_the_last_position_only_says_so(debugger: Debugger, out: list[str]) -> None:
    assert debugger.run_script(["b resid_post.1", "r", "rewind 3 logits"]) == 0
    assert out[-2].startswith("rewound to the step of position 3; logits is kept there at position 10 alone")
