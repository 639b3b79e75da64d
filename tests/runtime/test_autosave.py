"""Whom the files of autosave belong to: no session is lost to another, to a failed recovery or to a closed model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import djinn_fx as djinn
from djinn_fx.runtime.autosave import STALE
from tests.runtime.tiny import another_dj, compiled, guarded, prompt


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    yield from guarded(compiled("llama"))


def begun(dj: djinn.Dj, count: int) -> list[djinn.Session]:
    """Sessions with prompts of 5, 6, ... tokens, and one more."""
    made = [dj.session(seed) for seed in range(count)]
    for length, session in enumerate(made, 5):
        session.generate(prompt(length), max_new_tokens=1).run_to_end()
    return made


def left_in(folder: Path) -> list[int]:
    """Tokens of each session that another process would find in a folder, and the draws of those that say more."""
    with another_dj("llama", max_sessions=8) as other:
        return sorted(len(session.token_list) for session in other.recover(folder))


def longer(*sessions: djinn.Session) -> None:
    for session in sessions:
        session.generate(None, max_new_tokens=1).run_to_end()


def test_a_recovery_that_fails_costs_no_file(dj: djinn.Dj, tmp_path: Path) -> None:
    """Autosave runs in the folder meanwhile, and files of closed sessions go."""
    with dj.autosave(tmp_path, every=3600) as first:
        made = begun(dj, 2)
        first.save_now()
    for session in made:
        session.close()
    good, bad = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1])
    with dj.autosave(tmp_path, every=3600) as saver:
        real = type(dj.engine).seated_session

        def look_in(*given: object) -> djinn.Session:
            session = real(*given)  # type: ignore[arg-type]
            saver.save_now()
            return session

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(dj.engine), "seated_session", look_in)
            with pytest.raises(djinn.CheckpointError, match=r"cut off.* no session of .* was recovered.*move this one"):
                dj.recover(tmp_path)
        saver.save_now()
        assert not dj.sessions and sorted(tmp_path.iterdir()) == sorted([good, bad]) and saver.errors == []
        bad.write_bytes(whole)
        assert sorted(len(session.token_list) for session in dj.recover(tmp_path)) == [6, 7]
        longer(*dj.sessions)
        saver.save_now()
        assert sorted(tmp_path.iterdir()) == sorted([good, bad]), "they go on in their files"
        dj.sessions[0].close()
    assert left_in(tmp_path) == [8]
    dj.sessions[0].close()


def test_twins_of_one_file_each_have_a_file(dj: djinn.Dj, tmp_path: Path) -> None:
    with dj.autosave(tmp_path, every=3600) as saver:
        (session,) = begun(dj, 1)
        saver.save_now()
        (twin,) = dj.recover(tmp_path)
        longer(twin)
        saver.save_now()
        assert left_in(tmp_path) == [6, 7]
        session.close()
        saver.save_now()
        assert left_in(tmp_path) == [7]
    twin.close()


def test_two_models_in_one_folder_take_nothing_from_each_other(dj: djinn.Dj, tmp_path: Path) -> None:
    """As two processes would: one recovers what the other still has."""
    with another_dj("llama") as other, dj.autosave(tmp_path, every=3600) as mine:
        (session,) = begun(dj, 1)
        mine.save_now()
        (copy,) = other.recover(tmp_path)
        with other.autosave(tmp_path, every=3600) as theirs:
            longer(copy, copy)
            theirs.save_now()
            mine.save_now()  # nothing has changed here, but the file is theirs now
            assert left_in(tmp_path) == [6, 8]
            longer(session)
            mine.save_now()
            theirs.save_now()
            assert left_in(tmp_path) == [7, 8] and mine.errors == theirs.errors == []
            session.close()
            mine.save_now()
            assert left_in(tmp_path) == [8]


def test_a_file_that_somebody_removed_or_damaged_is_written_again(dj: djinn.Dj, tmp_path: Path) -> None:
    with dj.autosave(tmp_path, every=3600) as saver:
        begun(dj, 2)
        saver.save_now()
        gone, cut = tmp_path.iterdir()
        gone.unlink()
        cut.rename(tmp_path / "elsewhere")
        cut.write_bytes(b"half")
        saver.save_now()
        cut.unlink()
        assert left_in(tmp_path) == [6, 7]
        for session in dj.sessions:
            session.close()


def test_a_closed_model_leaves_the_files(tmp_path: Path) -> None:
    with another_dj("llama") as dj, dj.autosave(tmp_path, every=3600) as saver:
        begun(dj, 2)
        saver.save_now()
        dj.close()
        saver.save_now()
    assert left_in(tmp_path) == [6, 7]


def test_other_breakpoints_are_a_change(dj: djinn.Dj, tmp_path: Path) -> None:
    with dj.session() as session, dj.autosave(tmp_path, every=3600) as saver:
        run = session.generate(prompt(5), max_new_tokens=2, breakpoints=["resid_post.0"])
        next(run)
        saver.save_now()
        session.watch(["resid_post.1"])
        saver.save_now()
        with another_dj("llama") as other:
            (back,) = other.recover(tmp_path)
            assert back.run is not None and next(back.run).site == "resid_post.1"


def test_what_is_no_folder_of_sessions_is_told(dj: djinn.Dj, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something")
    for act in (dj.autosave, dj.recover):
        with pytest.raises(djinn.InvalidValue, match="'memory://a' is an address"):
            act("memory://a")
        with pytest.raises(djinn.CheckpointError, match=r"Give a folder|Check the folder"):
            act(tmp_path / "file")
    with pytest.raises(djinn.InvalidValue, match="every='often'"):
        dj.autosave(tmp_path / "a", every="often")  # type: ignore[arg-type]
    assert dj.recover(tmp_path / "none") == [] and [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "session-a.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(djinn.CheckpointError, match=r"cannot read the checkpoint .*session-a.safetensors"):
        dj.recover(tmp_path)


def test_drafts_of_the_dead_go(dj: djinn.Dj, tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (
        ".session-a.safetensors.1.tmp", ".session-b.safetensors.2.tmp", ".mine.safetensors.3.tmp"
    ))  # fmt: skip
    for path in (old, new, other):
        path.write_bytes(b"half of it")
    for path in (old, other):
        os.utime(path, (time.time() - STALE - 60,) * 2)
    dj.autosave(tmp_path, every=3600).stop()
    assert sorted(tmp_path.iterdir()) == sorted([new, other])
