"""More sessions than rows, than pinned memory, than the disk: nobody is lost, and nobody's bits change."""

from __future__ import annotations

import errno
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.disk import Folder
from tests.runtime.tiny import another_dj, assert_same, generated, prompt

LONG = 20  # tokens of a prompt; with three more that is 23 positions
ROW = 2 * 2 * 2 * 8 * 4  # bytes of a position: k and v, layers, heads, width, fp32


def small(rows: int, **options: Any) -> djinn.Dj:
    """A model of two rows with room on the host for so many sessions of 23 positions."""
    return another_dj("llama", max_sessions=2, pinned_bytes=rows * 6144, **options)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[djinn.Dj]:
    """Two rows, two sessions on the host, two on the disk."""
    with small(2, disk_bytes=2 * 23 * ROW, spill_dir=tmp_path) as dj:
        yield dj
    gc.collect()
    assert not list(tmp_path.iterdir()), "files stay behind"


def begun(dj: djinn.Dj, count: int) -> list[djinn.Session]:
    """Sessions that generated three tokens."""
    made = []
    for seed in range(count):
        made.append(dj.session(seed))
        made[-1].generate(prompt(LONG, seed), max_new_tokens=4).run_to_end()
    return made


def test_sessions_beyond_the_rows_go_on_as_if_alone() -> None:
    with small(8) as dj:
        wanted = [generated(dj, prompt(LONG, seed), 9) for seed in range(6)]
        sessions = [dj.session(seed) for seed in range(6)]
        runs = [
            s.generate(prompt(LONG, seed), max_new_tokens=9, output_logits=True, breakpoints=["resid_post.0"])
            for seed, s in enumerate(sessions)
        ]
        for _ in range(4):
            for run in runs:
                next(run)
        assert [s.tier for s in sessions] == ["host"] * 4 + ["device"] * 2
        for run, result in zip(runs, wanted, strict=True):
            assert_same(run.result(), result)


def test_who_moves_first() -> None:
    with small(8) as dj:
        first, second = begun(dj, 2)
        third = dj.session()
        assert [s.tier for s in (first, second, third)] == ["host", "device", "device"], "oldest paused first"
        second.pin()
        fourth = dj.session()
        assert [s.tier for s in (second, third, fourth)] == ["device", "host", "device"], "a pinned one stays"
        second.pin(False)
        second.idle_hint, fourth.idle_hint = 60.0, 3600.0
        dj.session()
        assert (second.tier, fourth.tier) == ("device", "host"), "the longest absence first"
        odd: Any
        for odd in (-1, float("nan"), float("inf"), "5", [1], torch.tensor(3.0)):
            with pytest.raises(djinn.InvalidValue, match="idle_hint="):
                second.idle_hint = odd
        assert second.idle_hint == 60.0


def test_a_session_is_there_before_its_user(monkeypatch: pytest.MonkeyPatch) -> None:
    with small(8) as dj:
        session, other = begun(dj, 2)
        session.offload()
        session.idle_hint = 0.0
        assert session.away is not None
        session.away.join(30)
        assert session.resident and other.resident


def test_all_tiers_full_is_the_newcomers_error_alone(disk: djinn.Dj) -> None:
    sessions = begun(disk, 6)
    assert [s.tier for s in sessions] == ["disk"] * 2 + ["host"] * 2 + ["device"] * 2
    memory = disk.memory()
    assert memory["disk"] == memory["disk_budget"] == 2 * 23 * ROW
    assert [place.tier for place in memory.sessions] == [s.tier for s in sessions]
    with pytest.raises(djinn.CapacityError, match="pinned_bytes"):
        disk.session()
    for turn, session in enumerate([*sessions, *sessions[::-1]]):  # everybody else goes on
        session.generate(None, max_new_tokens=1).run_to_end()
        assert session.resident, turn
    assert [s.length for s in sessions] == [25] * 6
    for session in sessions[:3]:
        session.close()
    assert disk.session().resident


def test_from_the_disk_bit_for_bit(disk: djinn.Dj) -> None:
    wanted = generated(disk, prompt(LONG), 9)
    session = disk.session()
    run = session.generate(prompt(LONG), max_new_tokens=9, output_logits=True, breakpoints=["resid_post.1"])
    for _ in range(4):
        next(run)
    others = begun(disk, 4)
    assert session.tier == "disk"
    held = session.checkpoint()
    assert_same(run.result(), wanted)
    for other in others[:3]:
        other.close()
    with disk.restore(held) as back:
        assert back.run is not None
        assert_same(back.run.result(), wanted)


def test_a_checkpoint_of_a_session_on_the_disk_outlives_its_model(tmp_path: Path) -> None:
    other, dj = small(2), small(1, disk_bytes=4 * 23 * ROW, spill_dir=tmp_path / "kv")
    sessions = begun(dj, 4)
    assert sessions[0].tier == "disk"
    held, wanted = sessions[0].checkpoint(), sessions[0].generate(None, max_new_tokens=4, output_logits=True).result()
    dj.close()
    with other.restore(held.save(tmp_path / "a.safetensors")) as back, other.restore(held) as twin:
        for session in (back, twin):
            assert_same(session.generate(None, max_new_tokens=4, output_logits=True).result(), wanted)
    del held, sessions
    gc.collect()
    assert not list((tmp_path / "kv").iterdir())
    other.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_a_killed_process_left_in_the_folder_goes(tmp_path: Path) -> None:
    made = [Folder(tmp_path) for _ in range(2)]
    (tmp_path / "djinn-kv-of somebody").mkdir()
    process = os.fork()
    if process == 0:
        child = Folder(tmp_path)
        (child.path / "1.kv").write_bytes(b"much")
        for each in made:  # a fork has its parent's locks too
            each._lock.close()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert len(list(tmp_path.iterdir())) == 4
    made.append(Folder(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"djinn-kv-of somebody", *(each.path.name for each in made)}


def test_a_disk_that_refuses_loses_nothing(disk: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = begun(disk, 4)

    disk_of = disk.engine.tiers.disk

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk_of, "_place", refuse)
        with pytest.raises(djinn.CapacityError, match="No space left on device"):
            disk.session()
    assert disk.memory()["disk"] == 0 and [s.tier for s in sessions] == ["host"] * 2 + ["device"] * 2
    for seed, session in enumerate(sessions):
        tokens = session.generate(None, max_new_tokens=1).result().tokens
        assert session.tokens[:LONG].tolist() == prompt(LONG, seed).tolist() and len(tokens) == 1


@pytest.mark.parametrize("part", ["send", "receive"])
def test_memory_that_runs_out_while_a_session_moves(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with small(8) as dj:
        wanted = [generated(dj, prompt(LONG, seed), 6) for seed in range(3)]
        sessions = [dj.session() for _ in range(3)]
        runs = [
            s.generate(prompt(LONG, seed), max_new_tokens=6, output_logits=True, breakpoints=["resid_post.0"])
            for seed, s in enumerate(sessions)
        ]
        for run in runs:
            next(run)

        def refuse(*_: object, **__: object) -> None:
            raise djinn.CapacityError("no memory")

        with monkeypatch.context() as patched:
            patched.setattr(dj.engine.transfer, part, refuse)
            with pytest.raises(djinn.CapacityError, match="no memory"):
                runs[0].result()
        for run, result in zip(runs, wanted, strict=True):
            assert_same(run.result(), result)


def test_poisoned_rows_reach_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with small(8) as dj:
        wanted = [generated(dj, prompt(LONG, seed), 6) for seed in range(5)]
        arena = dj.engine.arena

        def poison(row: int) -> None:
            for tensor in arena.env.values():
                tensor[row] = float("nan")

        monkeypatch.setattr(arena.packer, "clear", poison)
        for tensor in arena.env.values():
            tensor.fill_(float("nan"))
        sessions = [dj.session() for _ in range(5)]
        runs = [
            s.generate(prompt(LONG, i), max_new_tokens=6, output_logits=True, breakpoints=["resid_post.1"])
            for i, s in enumerate(sessions)
        ]
        for _ in range(3):
            for run in runs:
                next(run)
        for run, result in zip(runs, wanted, strict=True):
            assert_same(run.result(), result)
