"""Sessions that move to another process and to another GPU; a model on a GPU that is not the current one.

``DJINN_TEST_DEVICE=cpu DJINN_TEST_BACKEND=static`` runs what needs no GPU without one, uncompiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.session import Session
from tests.cuda_child import outcome
from tests.cuda_models import DEVICE, NEW, PROMPT, assert_same, compiled, direction, generated, model_of

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

ROOT = Path(__file__).resolve().parents[1]
NAME, DTYPE = "llama", "bf16"


def two_alike() -> bool:
    """Whether there are two GPUs of one kind."""
    if DEVICE != "cuda" or torch.cuda.device_count() < 2:
        return False
    return torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1)


# -- another process ---------------------------------------------------------------------------


def stopped(folder: Path) -> tuple[list[str], list[list[Any]]]:
    """Files of two sessions that wait with an edited value in hand, and what comes of them here."""
    dj, files, sessions = compiled(NAME, DTYPE, "few"), [], list[Session]()
    for position, steer in ((18, {"scale": 0.5}), (23, {"ablate": direction(1, 2, 128)})):
        session = dj.session(seed=position)
        session.steer("resid_post.0", **steer)
        point = djinn.break_at("mlp_out.1", positions=position)
        run = session.generate(PROMPT, max_new_tokens=NEW, output_logits=True, do_sample=True, breakpoints=[point])
        stop = next(run)
        stop.value.neg_()
        files.append(str(stop.checkpoint().save(folder / f"{position}.safetensors")))
        sessions.append(session)
    expected = [outcome(session) for session in sessions]
    for session in sessions:
        session.close()
    return files, expected


def restored(files: list[str], environment: dict[str, str]) -> list[list[Any]]:
    """What comes of those files in another process."""
    command = [sys.executable, "-m", "tests.cuda_child", NAME, DTYPE, *files]
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_restored_by_another_process(tmp_path: Path) -> None:
    files, expected = stopped(tmp_path)
    assert restored(files, {}) == expected


def test_restored_by_another_process_on_another_gpu(tmp_path: Path) -> None:
    if not two_alike():
        pytest.skip("needs two GPUs of one kind")
    second = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[1]
    files, expected = stopped(tmp_path)
    assert restored(files, {"CUDA_VISIBLE_DEVICES": second}) == expected


# -- another GPU -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both() -> Iterator[list[djinn.Dj]]:
    """One model, compiled on either GPU."""
    if not two_alike():
        pytest.skip("needs two GPUs of one kind")
    made = []
    for index in range(2):
        model = model_of.__wrapped__(NAME, DTYPE).to(f"cuda:{index}")
        made.append(djinn.compile(model, backend="inductor", max_length=64, max_sessions=2, prefill_chunk=16))
        assert torch.cuda.current_device() == 0
    yield made
    for dj in made:
        dj.close()


def edited(dj: djinn.Dj) -> djinn.Run:
    """A run that waits with an edited value in hand."""
    run = dj.session(seed=3).generate(
        PROMPT,
        max_new_tokens=NEW,
        output_logits=True,
        do_sample=True,
        breakpoints=[djinn.break_at("resid_post.1", positions=23)],
    )
    next(run).value.neg_()
    return run


def test_the_second_gpu_gives_the_same_bits_whichever_is_current(both: list[djinn.Dj]) -> None:
    whole = generated(both[0])
    assert_same(generated(both[1]), whole, "the first is current")
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert_same(generated(both[0]), whole, "the second is current")
        assert_same(generated(both[1]), whole, "its own is current")
        assert torch.cuda.current_device() == 1
    with torch.cuda.stream(torch.cuda.Stream(0)):
        assert_same(generated(both[1]), whole, "a stream of the first is current")
    with torch.cuda.stream(torch.cuda.Stream(1)):
        assert_same(generated(both[0]), whole, "a stream of the second is current")
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(generated(both[1])))
    thread.start()
    thread.join()
    assert_same(found[0], whole, "from another thread")


def test_sessions_move_between_the_two(both: list[djinn.Dj], tmp_path: Path) -> None:
    for here, there in (both, both[::-1]):
        run = edited(here)
        assert run.stop is not None
        in_memory = run.stop.checkpoint()
        file = in_memory.save(tmp_path / "a.safetensors")
        wanted = run.result()
        for checkpoint in (in_memory, file):
            with there.restore(checkpoint) as session:
                assert session.run is not None
                assert_same(session.run.result(), wanted)
        run.session.close()


def test_sessions_leave_the_second_and_come_back(both: list[djinn.Dj]) -> None:
    dj = both[1]
    runs = [edited(dj) for _ in range(4)]  # two rows: the others are on the host
    wanted = runs[0].result()
    for run in runs[1:]:
        assert_same(run.result(), wanted)
    for run in runs:
        run.session.close()
    assert torch.cuda.current_device() == 0
