"""Scripted runs, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.stop import Stop
from tests.bits import assert_same_bits
from tests.runtime.tiny import make_dj, model_of

SITES = ("embed", "attn_z.0", "attn_out.1", "resid_post", "final_norm", "logits")
PROMPT = list(range(3, 22))


def small_dj(model: Any, **options: Any) -> djinn.Dj:
    """Compile with these tests' sites; prompts take three chunks."""
    return make_dj(model, **{"sites": SITES, "prefill_chunk": 8} | options)


@cache
def shared(name: str) -> djinn.Dj:
    """The test session's compiled model of this name."""
    return small_dj(model_of(name))


def close_all(dj: djinn.Dj) -> None:
    """Close every session; rows must be free, and zero."""
    for session in list(dj.engine.sessions):
        session.close()
    assert dj.engine.arena.free_rows == dj.engine.options.max_sessions
    arrived(dj)
    assert not any(bool(tensor[:-1].any()) for pair in dj.engine.arena.layers for tensor in pair)


def arrived(dj: djinn.Dj) -> None:
    """Wait for the copy stream too, which zeroes the rows that sessions leave."""
    if dj.engine.device.type == "cuda":
        torch.cuda.synchronize()


def through_file(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Saved and loaded again."""
    return Checkpoint.load(checkpoint.save(folder / "a.safetensors"))


def run_of(session: Session) -> Run:
    """The run of a restored session."""
    assert session.run is not None
    return session.run


def start(session: Session, breakpoints: Iterable[str | djinn.Breakpoint], **options: Any) -> Run:
    """A sampled run over three prompt chunks and four tokens, three of which are forwarded."""
    chosen: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": True,
        "output_logits": True,
        "capture": ["resid_post.1"],
    }
    return session.generate(PROMPT, breakpoints=list(breakpoints), **chosen | options)


def edit(stop: Stop) -> None:
    """A change that no model shrugs off."""
    stop.value.mul_(torch.linspace(0.5, -1.5, stop.value.shape[-1], device=stop.value.device))


@dataclass
class Passed:
    """What happened on the way from one stop to the end."""

    places: list[tuple[str, int, tuple[int, ...]]]
    values: list[torch.Tensor]
    result: Result


def finish(run: Run, act: Callable[[Stop], None] | None = None) -> Passed:
    """Go on to the end, noting every stop."""
    places, values = [], []
    for stop in run:
        places.append((stop.site, stop.position, stop.fired))
        values.append(stop.value.clone())
        if act is not None:
            act(stop)
    return Passed(places, values, run.result())


def assert_same(a: Passed, b: Passed) -> None:
    """Every stop, every token and every logit alike, bit for bit."""
    assert a.places == b.places
    for place, one, other in zip(a.places, a.values, b.values, strict=True):
        assert_same_bits(one, other, str(place))
    assert_same_result(a.result, b.result)


def assert_same_result(a: Result, b: Result) -> None:
    """Every token, logit and captured value alike, bit for bit."""
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.finish_reason == b.finish_reason
    assert_same_bits(a.logits, b.logits)
    assert set(a.cache) == set(b.cache)
    for site in a.cache:
        assert_same_bits(a.cache[site], b.cache[site], site)
