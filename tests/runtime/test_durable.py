"""Saves that are killed, addresses, autosave and recovery."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime import fingerprint
from djinn_fx.runtime.checkpoint import Checkpoint
from tests.runtime.save_child import LONG, long_dj
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
        with one.restore(held.save(address)) as back:
            assert back.run is not None
            assert_same(back.run.result(), wanted)
    assert (tmp_path / "b.safetensors").is_file()
    with pytest.raises(djinn.CheckpointError, match="cannot read the checkpoint 'memory://none'"):
        one.restore("memory://none")
    whole = fsspec.filesystem("memory").cat_file("/kept/a.safetensors")
    for broken in (whole[:-9], whole[:40], whole[:-9] + bytes(9), b"something else"):
        fsspec.filesystem("memory").pipe_file("/kept/b.safetensors", broken)
        with pytest.raises(djinn.CheckpointError, match=r"'memory://kept/b.safetensors' is (damaged|not a djinn)"):
            one.restore("memory://kept/b.safetensors")
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


def test_the_weights_are_hashed_once_a_round_and_their_edits_noticed(
    one: djinn.Dj, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    real = fingerprint.fingerprint

    def counting(weights: Any) -> Any:
        hashed.append(len(weights))
        return real(weights)

    monkeypatch.setattr(fingerprint, "fingerprint", counting)
    weight = one.engine.identity.weights["model.norm.weight"]
    with one.session() as a, one.session() as b, one.autosave(tmp_path, every=3600) as saver:
        saver.save_now()
        first = len(hashed)
        for session in (a, b):
            session.generate(prompt(5), max_new_tokens=2).run_to_end()
        saver.save_now()
        assert len(hashed) == first + 1 and saver.errors == []
        saver.save_now()
        assert len(hashed) == first + 1, "nothing was written"
        for told in (True, False):
            with torch.no_grad():
                weight.mul_(2) if told else weight.data.div_(2)
            a.generate(None, max_new_tokens=1).run_to_end()
            for _ in range(2):  # an edit that leaves no trace is noticed where something is written
                saver.save_now()
            for file in tmp_path.iterdir():
                one.restore(file).close()  # it says the weights of now


def test_a_session_that_is_driven_is_saved(one: djinn.Dj, tmp_path: Path) -> None:
    """Its only quiet moments are those between two steps of a group."""
    seen: set[int] = set()
    with one.autosave(tmp_path, every=3600) as saver:
        sessions = [one.session(seed) for seed in range(3)]

        def tell(_: int) -> None:
            if sessions[0].length in (9, 20, 30) and sessions[0].length not in seen:
                seen.add(sessions[0].length)
                rounds.append(threading.Thread(target=saver.save_now))
                rounds[-1].start()

        rounds: list[threading.Thread] = []
        runs = [s.generate(prompt(6, i), max_new_tokens=40, on_token=tell) for i, s in enumerate(sessions)]
        wanted = [result.tokens.tolist() for result in one.results(runs)]
        for each in rounds:
            each.join(60)
        assert saver.errors == [] and saver.written >= 3
        for session in sessions:
            session.close()
        assert [len(tokens) for tokens in wanted] == [46] * 3


def test_autosave_needs_no_pinned_memory(tmp_path: Path) -> None:
    with another_dj("llama", pinned_bytes=6144) as dj:
        held = []
        with dj.session() as session, dj.autosave(tmp_path, every=3600) as saver:
            session.generate(prompt(20), max_new_tokens=2).run_to_end()
            held.append(session.checkpoint())
            with pytest.raises(djinn.CapacityError):
                session.checkpoint()
            saver.save_now()
            assert saver.errors == [] and saver.written


def test_a_process_killed_while_it_generates_is_recovered(tmp_path: Path) -> None:
    """A call that draws its tokens, and a group that does not: what was saved goes on to the tokens it would have."""
    dying = child("driven", tmp_path)
    chance = random.Random(1)
    time.sleep(chance.uniform(0.05, 0.3))
    kill(dying)
    with long_dj() as dj:
        found = sorted(dj.recover(tmp_path), key=lambda session: session.seed)
        assert [session.seed for session in found] == [0, 1, 2]
        lengths = [session.length for session in found]
        assert max(lengths) > 12, lengths
        for session in found:
            assert session.run is not None
            known, after = session.tokens.tolist(), session.run.result().tokens.tolist()
            with dj.session(seed=session.seed) as twin:
                again = twin.generate(prompt(6, session.seed), max_new_tokens=LONG, do_sample=not session.seed).result()
            assert after == again.tokens.tolist() and known == after[: len(known)]
            session.close()


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
