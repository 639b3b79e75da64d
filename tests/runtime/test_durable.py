"""Saves that are killed, addresses, autosave and recovery."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import djinn_fx as djinn
from djinn_fx.runtime.checkpoint import Checkpoint
from tests.runtime.tiny import another_dj, assert_same, generated, prompt

#: Kills of a saving process; 200 take some seconds.
KILLS = int(os.environ.get("DJINN_KILLS", "200"))


def child(what: str, path: Path) -> subprocess.Popen[str]:
    """A process of :mod:`tests.runtime.save_child` that is ready."""
    made = subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.save_child", what, str(path)],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert made.stdout is not None and made.stdout.readline() == "ready\n"
    return made


def kill(process: subprocess.Popen[str]) -> None:
    """With -9, at once."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def forks_killed(dj: djinn.Dj, path: Path, times: int) -> set[int]:
    """Fork, save in the fork, kill it at any moment; lengths of what the name held afterwards."""
    held = []
    for length in (5, 9):
        with dj.session() as session:
            session.generate(prompt(length), max_new_tokens=3).run_to_end()
            held.append(session.checkpoint().wait())
    held[0].save(path)
    begun = time.perf_counter()
    held[0].save(path)
    one, chance, found = time.perf_counter() - begun, random.Random(0), set()
    for turn in range(times):
        process = os.fork()
        if process == 0:
            try:
                while True:
                    held[turn % 2].save(path)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, 3 * one))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        found.add(len(Checkpoint.load(path)._contents().session["tokens"]))
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_kill_9_leaves_the_old_file_or_the_new_one(one: djinn.Dj, tmp_path: Path) -> None:
    assert forks_killed(one, tmp_path / "a.safetensors", KILLS) <= {8, 12}


def test_an_address_of_fsspec(one: djinn.Dj, tmp_path: Path) -> None:
    wanted = generated(one, prompt(9), 6)
    with one.session() as session:
        run = session.generate(prompt(9), max_new_tokens=6, output_logits=True, breakpoints=["resid_post.0"])
        next(run)
        held = session.checkpoint()
    for address in ("memory://kept/a.safetensors", f"file://{tmp_path}/b.safetensors"):
        held.save(address)
        with one.restore(address) as back:
            assert back.run is not None
            assert_same(back.run.result(), wanted)
    assert (tmp_path / "b.safetensors").is_file()
    with pytest.raises(djinn.CheckpointError, match="cannot read the checkpoint 'memory://none'"):
        one.restore("memory://none")
    with pytest.raises(djinn.CheckpointError, match="cannot write the checkpoint 'nonesuch://a'"):
        held.save("nonesuch://a")


def test_a_full_disk_leaves_the_old_file(one: djinn.Dj, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    with one.session() as session:
        session.generate(prompt(5), max_new_tokens=2).run_to_end()
        session.checkpoint().save(path)
        before = path.read_bytes()
        session.generate(None, max_new_tokens=2).run_to_end()

        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            with pytest.raises(djinn.CheckpointError, match=r"No space left on device.*Nothing changed"):
                session.checkpoint().save(path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_flipped_bytes_are_seen(one: djinn.Dj, tmp_path: Path) -> None:
    path, chance = tmp_path / "a.safetensors", random.Random(0)
    with one.session() as session:
        session.generate(prompt(5), max_new_tokens=2).run_to_end()
        session.checkpoint().save(path)
    whole = path.read_bytes()
    for _ in range(60):
        place = chance.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(djinn.CheckpointError):
            Checkpoint.load(path)


def test_autosave_writes_what_changed(one: djinn.Dj, tmp_path: Path) -> None:
    with one.session() as a, one.session() as b, one.autosave(tmp_path, every=3600) as saver:
        saver.save_now()
        assert saver.written == 2
        saver.save_now()
        assert saver.written == 2, "nothing changed"
        run = a.generate(prompt(5), max_new_tokens=3, breakpoints=["resid_post.0"])
        stop = next(run)
        saver.save_now()
        assert saver.written == 3
        stop.value.mul_(2)
        saver.save_now()
        assert saver.written == 4 and saver.errors == []
        b.close()
        saver.save_now()
        assert len(list(tmp_path.iterdir())) == 1
        wanted = run.result()
        saver.stop()
    assert len(list(tmp_path.iterdir())) == 1 and wanted.finish_reason == "length"


def test_a_killed_process_is_recovered(tmp_path: Path) -> None:
    kill(child("autosave", tmp_path))
    dj = another_dj("llama", batch_invariant=True)
    (session,) = dj.recover(tmp_path)
    known = session.tokens.tolist()
    after = session.generate(None, max_new_tokens=5).result().tokens
    assert session.seed == 3 and len(known) >= 6 and len(after) == 5
    session.close()
    with dj.session(seed=3) as twin:  # the same calls again, uninterrupted
        while len(twin.token_list) < len(known):
            twin.generate(prompt(2, twin.length), max_new_tokens=1).run_to_end()
        assert twin.token_list == known
        assert twin.generate(None, max_new_tokens=5).result().tokens.tolist() == after.tolist()
    dj.close()
