"""The harvest of activations: right values, no pads, and killed and begun again the same files bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from examples.harvest import INDEX, UNFINISHED, Plan, harvest, load, main, windows
from tests.bits import assert_same_bits

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 16
PLAN = Plan(("resid_post.1", "attn_z.0"), length=LENGTH, rows=4, batches=2)

# Runs a harvest that kills itself, as a machine would, when so many bytes of the text are done.
KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_harvest import PLAN, compiled, harvest

def progress(done):
    if done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

harvest(*compiled(), Path(sys.argv[1]), Path(sys.argv[2]), PLAN, progress=progress)
"""


@cache
def compiled() -> tuple[djinn.Dj, Any]:
    torch.set_num_threads(1)
    model, tokenizer = storyteller()
    options: dict[str, Any] = {"max_sessions": 1, "max_length": LENGTH, "prefill_chunk": LENGTH, "verify": False}
    return djinn.compile(model, tokenizer=tokenizer, **options), tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Lines of many lengths: empty ones, short ones and some longer than a window."""
    path = tmp_path / "text.txt"
    lines = ["The sun was warm." * (1 + count % 5) if count % 4 else "" for count in range(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def test_every_token_has_its_own_activation_and_no_pad_has_one(text: Path, tmp_path: Path) -> None:
    dj, tokenizer = compiled()
    done: list[int] = []
    index = harvest(dj, tokenizer, text, tmp_path / "out", PLAN, progress=done.append)
    all_windows = list(windows(text, tokenizer, LENGTH))
    assert len({len(window.tokens) for window in all_windows}) > 2, "no pads: nothing is tested"
    assert index["complete"] and index["tokens"] == sum(len(window.tokens) for window in all_windows)
    assert done == sorted(done) and done[-1] == text.stat().st_size
    values = {name: torch.cat(list(load(tmp_path / "out", name))) for name in ("resid_post.1", "attn_z.0", "token")}
    assert values["token"].tolist() == [token for window in all_windows for token in window.tokens]
    places = torch.cat(list(load(tmp_path / "out", "position")))
    assert places.tolist() == [place for window in all_windows for place in range(len(window.tokens))]
    lines = torch.cat(list(load(tmp_path / "out", "line")))
    assert lines.tolist() == [window.line for window in all_windows for _ in window.tokens]
    for name in PLAN.sites:
        alone = [dj.run_with_cache(list(window.tokens), name, logits=False)[1][name][0] for window in all_windows]
        torch.testing.assert_close(values[name], torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_and_begun_again_it_is_as_if_nothing_had_been(text: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    harvest(*compiled(), text, whole, PLAN)
    command = [sys.executable, "-c", KILLED, str(text), str(killed), str(text.stat().st_size // 2)]
    answer = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    before = files(killed)
    assert 0 < len(json.loads(before[INDEX])["shards"]) < len(files(whole)) - 1
    (killed / UNFINISHED).mkdir(exist_ok=True)
    (killed / UNFINISHED / "harvest-00009.safetensors").write_bytes(b"what a kill leaves")
    harvest(*compiled(), text, killed, PLAN)
    assert files(killed) == files(whole)
    assert sorted(path.name for path in killed.iterdir()) == sorted(files(whole)), "what the kill left is gone"


def test_a_finished_harvest_computes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = harvest(*compiled(), text, out, PLAN)
    monkeypatch.setattr("examples.harvest.activations", None)
    assert harvest(*compiled(), text, out, PLAN) == first


def test_a_lost_shard_is_made_again(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    harvest(*compiled(), text, out, PLAN)
    before = files(out)
    (out / "harvest-00001.safetensors").unlink()
    harvest(*compiled(), text, out, PLAN)
    assert files(out) == before


def test_another_harvest_is_not_mixed_in(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    harvest(*compiled(), text, out, PLAN)
    before = files(out)
    with pytest.raises(ValueError, match="another plan"):
        harvest(*compiled(), text, out, Plan(("resid_post.0",), length=LENGTH))
    text.write_text("Anna walked.", encoding="utf-8")
    with pytest.raises(ValueError, match="another text"):
        harvest(*compiled(), text, out, PLAN)
    assert files(out) == before


@pytest.mark.parametrize("content", ["", '{"x":', "[]", '{"shards": [1]}'])
def test_a_damaged_index_is_told_and_left(text: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        harvest(*compiled(), text, tmp_path, PLAN)
    assert (tmp_path / INDEX).read_text() == content


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"The sky\n\nAnna \xff\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: no UTF-8 at byte 5"):
        harvest(*compiled(), tmp_path / "a.txt", tmp_path / "out", PLAN)


def test_mistakes_on_the_command_line_are_told(text: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    for arguments, said in (
        (["--sites", "zzz[/x]"], "no site 'zzz[/x]'"),
        (["--device", "foo"], "no device 'foo'"),
        (["--out", str(text)], "File exists"),
    ):
        done = CliRunner().invoke(app, [str(text), "--out", str(tmp_path / "out"), "--length", "16", *arguments])
        assert done.exit_code == 2, done.output
        assert said in done.output.replace("\n", " ")


def test_skipped_positions_and_another_dtype(text: Path, tmp_path: Path) -> None:
    plan = Plan(("resid_post.1",), length=LENGTH, rows=4, skip=1, dtype="float16")
    harvest(*compiled(), text, tmp_path / "out", plan)
    harvest(*compiled(), text, tmp_path / "all", PLAN)
    kept = torch.cat(list(load(tmp_path / "all", "position"))) >= 1
    expected = torch.cat(list(load(tmp_path / "all", "resid_post.1")))[kept].half()
    assert_same_bits(torch.cat(list(load(tmp_path / "out", "resid_post.1"))), expected)


def test_nothing_behind_the_last_wanted_layer_runs(text: Path, tmp_path: Path) -> None:
    dj, tokenizer = compiled()
    seen: list[str] = []
    original = dj.run_with_cache

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["stop_after"])
        assert kwargs["logits"] is False
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dj, "run_with_cache", watched)
        harvest(dj, tokenizer, text, tmp_path / "out", PLAN)
    assert set(seen) == {"resid_post.1"}


def test_the_command_line(text: Path, tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "harvest.py"), str(text), "--length", "16", "--sites", "resid_post.0"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    assert "tokens in 1 shards in harvest" in answer.stdout
    assert json.loads((tmp_path / "harvest" / INDEX).read_text())["complete"]


def test_a_full_disk_is_said_and_what_was_written_stays(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are written on another thread; what fails there must not be lost."""
    written: list[object] = []

    def full(*args: Any, **kwargs: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(args)
        save_file(*args, **kwargs)

    monkeypatch.setattr("examples.harvest.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        harvest(*compiled(), text, tmp_path / "out", PLAN)
    assert len(json.loads((tmp_path / "out" / INDEX).read_text())["shards"]) == 2
    monkeypatch.undo()
    harvest(*compiled(), text, tmp_path / "out", PLAN)
    harvest(*compiled(), text, tmp_path / "whole", PLAN)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
