"""Memory or disk that runs out while something moves: a named error, and every session goes on with its bits."""

from __future__ import annotations

import errno
import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime import checkpoint, checkpoint_file, moves, pinned
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from tests.runtime.live import ended
from tests.runtime.tiny import another_dj, assert_same, generated, guarded, prompt

LONG, NEW, COUNT = 20, 6, 3


@pytest.fixture(scope="module")
def made() -> Iterator[djinn.Dj]:
    """Four rows, and memory for all."""
    with another_dj("llama", pinned_bytes=1 << 20) as dj:
        yield dj


@pytest.fixture
def dj(made: djinn.Dj) -> Iterator[djinn.Dj]:
    """The same, clean afterwards."""
    yield from guarded(made)


@pytest.fixture(scope="module")
def wanted(made: djinn.Dj) -> list[Result]:
    """What the runs of :func:`begun` come to."""
    return [generated(made, prompt(LONG, seed), NEW) for seed in range(COUNT)]


def begun(dj: djinn.Dj, steps: int) -> list[Run]:
    """Runs of three sessions that stand at a stop: in a prompt, or some tokens on."""
    runs = []
    for seed in range(COUNT):
        session = dj.session(seed)
        runs.append(
            session.generate(prompt(LONG, seed), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        )
        for _ in range(steps):
            next(runs[-1])
    return runs


def raises(error: BaseException) -> Callable[..., Any]:
    """A function that raises."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:123] DefaultCPUAllocator: can't allocate memory")

ACTS: dict[str, Callable[[djinn.Dj, Run, Path], Any]] = {
    "offload": lambda dj, run, path: run.session.offload(),
    "checkpoint": lambda dj, run, path: run.session.checkpoint(),
    "fork": lambda dj, run, path: run.stop.fork(1),  # type: ignore[union-attr]
    "save": lambda dj, run, path: run.session.checkpoint().save(path / "a.safetensors"),
    "return": lambda dj, run, path: run.session.pin(),
    "restore": lambda dj, run, path: dj.restore(run.session.checkpoint()),
}

#: What refuses, and which acts it stops: a name for each allocation on a session's way.
SEAMS: dict[str, tuple[Any, str, BaseException, tuple[str, ...]]] = {
    "the host's slab": (pinned, "Slab", MemoryError("no"), ("offload", "checkpoint", "save", "restore")),
    "cudaHostAlloc": (
        pinned, "Slab", RuntimeError("CUDA error: out of memory"), ("offload", "checkpoint", "save", "restore"),
    ),
    "a stop's value": (checkpoint, "snapshot", DEVICE, ("checkpoint", "save", "restore")),
    "packing": ("packer", "pack", DEVICE, ("offload", "checkpoint", "save", "restore")),
    "unpacking": ("packer", "unpack", DEVICE, ("return", "restore")),
    "copying a row": ("packer", "copy", DEVICE, ("fork",)),
    "a stop": (moves, "deliver", DEVICE, ("fork", "restore")),
    "the file's tensors": (checkpoint_file, "_apart", MemoryError("no"), ("save",)),
    "the fetched values": (checkpoint, "fetch", HOST, ("save", "restore")),
}  # fmt: skip
CASES = [(seam, act) for seam, (_, _, _, acts) in SEAMS.items() for act in acts]


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize(("seam", "act"), CASES)
def test_memory_that_runs_out_leaves_every_session_usable(
    dj: djinn.Dj, wanted: list[Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seam: str, act: str, steps: int
) -> None:
    place, name, error, _ = SEAMS[seam]
    runs = begun(dj, steps)
    if act == "return":
        runs[1].session.offload()
    if name == "Slab":
        dj.engine.pool._slabs.clear()  # so that one is needed
    place = dj.engine.arena.packer if place == "packer" else place
    with monkeypatch.context() as patched:
        patched.setattr(place, name, raises(error))
        with pytest.raises((djinn.CapacityError, djinn.CheckpointError)) as caught:
            ACTS[act](dj, runs[1], tmp_path)
        assert type(error).__name__ in str(caught.value) or str(error)[:20] in str(caught.value)
    assert len(dj.sessions) == COUNT and not list(tmp_path.iterdir())
    ended(dj, runs, wanted)


def test_a_rewind_without_memory_goes_on_from_there(
    dj: djinn.Dj, wanted: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for position in (3, LONG + 1):
        runs = begun(dj, 5)
        with monkeypatch.context() as patched:
            patched.setattr(moves, "execute", raises(DEVICE))
            with pytest.raises(djinn.CapacityError, match="can go on from there"):
                runs[1].rewind(position, "resid_post.0")
        assert runs[1].stop is None and not runs[1].finished
        ended(dj, runs, wanted)


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("part", ["pack", "clear", "unpack"])
def test_an_interrupt_in_the_middle_of_a_move_costs_nobody_a_bit(
    dj: djinn.Dj, wanted: list[Result], monkeypatch: pytest.MonkeyPatch, part: str, steps: int
) -> None:
    """Ctrl-C is told to Python when a copy returns."""
    runs, packer = begun(dj, steps), dj.engine.arena.packer
    session, real = runs[1].session, getattr(packer, part)

    def interrupted(*given: Any) -> None:
        real(*given)
        raise KeyboardInterrupt

    if part == "unpack":
        session.offload()
    with monkeypatch.context() as patched:
        patched.setattr(packer, part, interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.pin() if part == "unpack" else session.offload()
    assert dj.engine.arena.free_rows == 4 - sum(run.session.resident for run in runs)
    ended(dj, runs, wanted)


@pytest.mark.parametrize("place", ["_drawn_first", "Flight"])
@pytest.mark.parametrize("position", [3, LONG + 1])
def test_a_rewind_that_is_interrupted_before_it_begins(
    dj: djinn.Dj, wanted: list[Result], monkeypatch: pytest.MonkeyPatch, place: str, position: int
) -> None:
    runs = begun(dj, 5)
    with monkeypatch.context() as patched:
        patched.setattr(moves, place, raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            runs[1].rewind(position, "resid_post.0")
    ended(dj, runs, wanted)


FULL = OSError(errno.ENOSPC, "No space left on device")


def half_written(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half of it")
    raise FULL


@pytest.mark.parametrize(
    ("place", "name", "refuse"),
    [(checkpoint_file, "save_file", half_written), (os, "fsync", raises(FULL)), (os, "replace", raises(FULL))],
    ids=["write", "fsync", "rename"],
)
def test_a_full_disk_loses_nothing(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Any, name: str, refuse: Any
) -> None:
    path = tmp_path / "saved" / "a.safetensors"
    path.parent.mkdir()
    with dj.session() as session, dj.session() as other, dj.autosave(tmp_path / "auto", every=3600) as saver:
        session.generate(prompt(5), max_new_tokens=2).run_to_end()
        other.generate(prompt(6), max_new_tokens=2).run_to_end()
        session.checkpoint().save(path)
        saver.save_now()
        before, kept = path.read_bytes(), {file: file.read_bytes() for file in saver.folder.iterdir()}
        session.generate(None, max_new_tokens=2).run_to_end()
        with monkeypatch.context() as patched:
            patched.setattr(place, name, refuse)
            with pytest.raises(djinn.CheckpointError, match=r"No space left on device.*Nothing changed"):
                session.checkpoint().save(path)
            saver.save_now()
            assert [str(error) for error in saver.errors if "No space left" in str(error)], saver.errors
        assert path.read_bytes() == before and list(path.parent.iterdir()) == [path], "a draft stays behind"
        assert {file: file.read_bytes() for file in saver.folder.iterdir()} == kept
        saver.save_now()  # and on it goes
        assert saver.errors == [] and {file: file.read_bytes() for file in saver.folder.iterdir()} != kept
        session.checkpoint().save(path)
        with dj.restore(path) as back:
            assert back.tokens.tolist() == session.tokens.tolist()


def test_a_folder_that_cannot_be_synced_is_told_apart(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    with dj.session() as session, monkeypatch.context() as patched:
        session.generate(prompt(5), max_new_tokens=2).run_to_end()
        patched.setattr(checkpoint_file, "_sync_folder", raises(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(djinn.CheckpointError, match="is written, whole, but its folder cannot be synced"):
            session.checkpoint().save(path)
        with dj.restore(path) as back:
            assert back.tokens.tolist() == session.tokens.tolist()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_while_a_session_goes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened, and its first byte is refused by the system."""
    with another_dj("llama", max_sessions=1, pinned_bytes=6144, disk_bytes=1 << 20, spill_dir=tmp_path) as dj:
        wanted = [generated(dj, prompt(LONG, seed), NEW) for seed in range(4)]
        sessions = [dj.session(seed) for seed in range(2)]
        runs = [s.generate(prompt(LONG, i), max_new_tokens=NEW, output_logits=True) for i, s in enumerate(sessions)]
        for run in runs:
            run.rewind(3) if run.stop else run.session.watch(["resid_post.0"])
            next(run)
        folder = dj.engine.tiers.disk._place().path
        (folder / "1.kv").symlink_to("/dev/full")
        with pytest.raises(djinn.CapacityError, match=r"the disk refuses .* No space left on device"):
            dj.session()
        assert sorted(s.tier for s in sessions) == ["device", "host"] and dj.memory()["disk"] == 0
        third = dj.session()  # there is room on the disk now
        assert sorted(s.tier for s in dj.sessions) == ["device", "disk", "host"]
        third.close()
        for run, result in zip(runs, wanted[:2], strict=True):
            assert_same(run.result(), result)


def test_an_autosave_that_fails_in_any_way_goes_on(
    dj: djinn.Dj, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dj.session() as session, dj.autosave(tmp_path, every=0.02) as saver:
        with monkeypatch.context() as patched:
            patched.setattr("djinn_fx.runtime.autosave.Mark", raises(ZeroDivisionError("a fault of ours")))
            while not saver.errors:
                time.sleep(0.01)
        session.generate(prompt(5), max_new_tokens=2).run_to_end()
        deadline = time.monotonic() + 60
        while (saver.errors or not saver.written) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert saver.written


@pytest.mark.parametrize("error", [MemoryError, djinn.CapacityError, RuntimeError])
def test_a_call_without_memory_leaves_nothing_behind(
    dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """No frame and its error keep one another, and with them what the call had made: no collector is needed."""
    stop, seen = begun(dj, 1)[0].stop, []
    assert stop is not None

    def refuse(*_: object, **__: object) -> None:
        made = torch.zeros(3)
        seen.append(weakref.ref(made))
        raise error("no room")

    gc.collect()
    gc.disable()
    try:
        for owner, name, call in ((dj.engine.transfer, "send", stop.checkpoint), (dj.engine.arena, "copy", stop.fork)):
            monkeypatch.setattr(owner, name, refuse)
            with suppress(djinn.CapacityError, RuntimeError):
                call()
            assert seen[-1]() is None, name
    finally:
        gc.enable()
    assert len(seen) == 2
    for session in list(dj.engine.sessions):
        session.close()
