"""What must reach nobody else: users' exceptions, and what lies in memory that is not one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from tests.runtime.live import ended
from tests.runtime.tiny import another_dj, assert_same, generated, guarded, prompt

LONG, NEW, COUNT = 20, 8, 3


class Upset(Exception):
    """What a user's code raises."""


@pytest.fixture(scope="module", params=["eager", "static"])
def made(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    """A model whose bits do not depend on who decodes beside, on both kinds of backend."""
    with another_dj("llama", batch_invariant=True, backend=request.param) as dj:
        yield dj


@pytest.fixture
def dj(made: djinn.Dj) -> Iterator[djinn.Dj]:
    """The same, clean afterwards."""
    yield from guarded(made)


@pytest.fixture(scope="module")
def wanted(made: djinn.Dj) -> list[Result]:
    """What the runs come to."""
    return [generated(made, prompt(LONG, seed), NEW) for seed in range(COUNT)]


def begun(dj: djinn.Dj, **first: Any) -> list[Run]:
    """Three runs; the first one with what upsets it."""
    return [
        dj.session(seed).generate(
            prompt(LONG, seed), max_new_tokens=NEW, output_logits=True, **(first if seed == 0 else {})
        )
        for seed in range(COUNT)
    ]


def upset_at(count: int) -> Callable[..., Any]:
    """A callback or a predicate that raises once, when it is called for the ``count``-th time."""
    calls: list[int] = []

    def act(value: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise Upset("not today")
        return value[0] != value[0] if isinstance(value, torch.Tensor) else None

    return act


def results(dj: djinn.Dj, runs: list[Run]) -> None:
    dj.results(runs)


def stops(dj: djinn.Dj, runs: list[Run]) -> None:
    for _ in dj.as_stopped(runs):
        pass


@pytest.mark.parametrize("drive", [results, stops])
@pytest.mark.parametrize("count", [1, 3, NEW])
def test_an_upset_on_token(dj: djinn.Dj, wanted: list[Result], drive: Any, count: int) -> None:
    told: list[list[int]] = [[], [], []]
    runs = begun(dj, on_token=upset_at(count))
    for run, heard in zip(runs[1:], told[1:], strict=True):
        object.__setattr__(run.options, "on_token", heard.append)
    with pytest.raises(Upset):
        drive(dj, runs)
    drive(dj, runs)
    ended(dj, runs, wanted)
    for result, heard in zip(wanted[1:], told[1:], strict=True):
        assert heard == result.tokens[LONG:].tolist(), "a neighbour was not told of a token, or twice"


@pytest.mark.parametrize("count", [3, 4, 6])
def test_an_upset_predicate(dj: djinn.Dj, wanted: list[Result], count: int) -> None:
    """It is called once when it is armed."""
    runs = begun(dj, breakpoints=[djinn.break_at("resid_post.1", upset_at(count))])
    with pytest.raises(djinn.InvalidPredicate, match="not today"):
        stops(dj, runs)
    stops(dj, runs)
    ended(dj, runs, wanted)


def test_an_upset_loop(dj: djinn.Dj, wanted: list[Result]) -> None:
    runs = begun(dj, breakpoints=["resid_post.0"])
    for kind in range(4):
        with pytest.raises(Upset):
            for _ in runs[0] if kind % 2 else dj.as_stopped(runs):
                raise Upset
    with pytest.raises(Upset), dj.session() as other:
        next(other.generate(prompt(5), max_new_tokens=2, breakpoints=["resid_post.0"]))
        raise Upset
    ended(dj, runs, wanted)


def test_an_upset_watch(dj: djinn.Dj, wanted: list[Result]) -> None:
    runs = begun(dj, breakpoints=["resid_post.0"])
    next(runs[0])
    before = list(runs[0].breakpoints)
    with pytest.raises(djinn.InvalidPredicate, match="not today"):
        runs[0].session.watch([djinn.break_at("resid_post.1", upset_at(1))])
    assert runs[0].breakpoints == before and runs[0].stop is not None
    ended(dj, runs, wanted)


def test_an_upset_hook(dj: djinn.Dj, wanted: list[Result]) -> None:
    runs = begun(dj, breakpoints=["resid_post.0"])
    next(runs[0])

    def hook(value: Any, hook: Any) -> Any:
        raise Upset

    for _ in range(2):
        with pytest.raises(Upset):
            dj.run_with_hooks(prompt(LONG), fwd_hooks=[("resid_post.0", hook)])
    ended(dj, runs, wanted)


def test_an_upset_queue(dj: djinn.Dj, wanted: list[Result]) -> None:
    """``dj.generate`` as a whole fails; nobody beside it notices, and its rows are free again."""
    runs = begun(dj, breakpoints=["resid_post.0"])
    next(runs[0])
    for number in (1, 4):
        calls = iter(range(100))

        def tell(index: int, token: int, number: int = number, calls: Iterator[int] = calls) -> None:
            if next(calls) == number:
                raise Upset

        with pytest.raises(Upset):
            dj.generate([prompt(5), prompt(6), prompt(7)], max_new_tokens=4, on_token=tell)
        assert len(dj.sessions) == COUNT
    with pytest.raises(djinn.CapacityError, match=r"prompts\[1\] has 65 tokens.*max_length=64.*Nothing was computed"):
        dj.generate([prompt(5), prompt(65), prompt(7)], max_new_tokens=4)
    with pytest.raises(djinn.InvalidValue, match=r"prompts\[2\] is empty"):
        dj.generate([[5], [6], []], max_new_tokens=4)
    with pytest.raises(djinn.InvalidValue, match=r"token id 64 of prompts\[1\] is outside"):
        dj.generate([[5], [64], [6]], max_new_tokens=4)
    ended(dj, runs, wanted)


# -- memory that is not one's own -----------------------------------------------------------------


def spoil(dj: djinn.Dj, value: float) -> None:
    """Fill every place of the arena that no session has written: free rows, and what lies behind a session's length."""
    owned = {session.row: session.extent for session in dj.sessions if session.resident}
    with dj.engine.lock:
        for tensor in dj.engine.arena.env.values():
            for row in range(tensor.shape[0]):
                tensor[row, :, owned.get(row, 0) :] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, -7.0])
def test_what_lies_behind_a_session_reaches_nobody(
    dj: djinn.Dj, wanted: list[Result], monkeypatch: pytest.MonkeyPatch, value: float, tmp_path: Any
) -> None:
    """Through decode, moves, forks, rewinds, checkpoints in memory and in files."""
    arena = dj.engine.arena

    def dirty(row: int) -> None:
        for tensor in arena.env.values():
            tensor[row] = value

    with monkeypatch.context() as patched:
        patched.setattr(arena.packer, "clear", dirty)
        runs = begun(dj, breakpoints=["resid_post.0"])
        runs[1].session.watch(["resid_post.1"])
        for turn in range(5):
            spoil(dj, value)
            for run in runs[:2]:
                next(run)
            spoil(dj, value)
            runs[turn % 2].session.offload()
        held = runs[0].session.checkpoint()
        held.save(tmp_path / "a.safetensors")
        spoil(dj, value)
        (fork,) = runs[1].stop.fork(1)  # type: ignore[union-attr]
        spoil(dj, value)
        assert_same(fork.run.result(), wanted[1])
        fork.session.close()
        for source in (held, tmp_path / "a.safetensors"):
            spoil(dj, value)
            with dj.restore(source) as back:
                spoil(dj, value)
                assert back.run is not None
                assert_same(back.run.result(), wanted[0])
        runs[0].rewind(3, "resid_post.0")
        spoil(dj, value)
        ended(dj, runs, wanted)
    for tensor in arena.env.values():
        tensor.zero_()
