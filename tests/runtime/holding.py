"""A GPU that is kept busy, for tests of who waits for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

import djinn_fx as djinn
from tests.runtime.checkpoint_cases import small_dj, start
from tests.runtime.tiny import make_model

#: Cycles that a stream sleeps: tens of milliseconds, longer than everything that a test enqueues behind.
LONG = 100_000_000


@cache
def compiled(name: str) -> djinn.Dj:
    """A tiny model on the GPU, run op by op; it has done everything once, since CUDA waits to load a kernel."""
    made = small_dj(make_model(name).cuda(), backend="eager")
    made.warmup()
    with made.session() as session:
        next(start(session, ["resid_post.1"]))
        session.checkpoint().wait()
        session.offload()
    return made


def hold_up(dj: djinn.Dj) -> None:
    """Let the copy stream sleep: what is sent now is packed much later, unless somebody waits for it."""
    stream = dj.engine.transfer._stream
    assert stream is not None
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail if the host waits for the device, which is kept busy meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    try:
        yield
        assert not busy.query(), "the call returned only when the device was through"
    finally:
        torch.cuda.set_sync_debug_mode("default")
