"""Weights are looked at in two parts where graphs run: a glance before a prompt's first launch, the rest behind it.

On the CPU, which has no graphs, the models here are told to glance too. Their segments read shapes and strides anew
each time, so what ran between the two looks may have been computed from other weights: none of it may be left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import djinn_fx as djinn
from djinn_fx.runtime.executor import Executor
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from tests.backends import STREAM
from tests.bits import assert_same_bits
from tests.runtime.tiny import NEW, PROMPT, assert_same, bits_of, make_dj, make_model, prompt, some

IDS = prompt(PROMPT)
#: Undoes a change of the weights.
Undo = Callable[[], object]


@pytest.fixture(scope="module", params=["eager", "static", pytest.param("graphs", marks=pytest.mark.gpu)])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[djinn.Dj, Any]]:
    graphs = request.param == "graphs"
    model = make_model("llama").to("cuda" if graphs else "cpu")
    dj = make_dj(model, backend="static" if graphs else request.param)
    guard: Any = dj.engine.guard
    assert (dj.engine.glance is not None) == (graphs and not STREAM)
    dj.engine.glance = guard.__self__.glance
    yield dj, model
    dj.close()


@pytest.fixture
def dj(made: tuple[djinn.Dj, Any]) -> djinn.Dj:
    return made[0]


@pytest.fixture
def looks(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens from now on: ``glance``, ``guard`` (the full look), ``launch`` of segments of a chunk."""
    happened: list[str] = []

    def told(word: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any) -> Any:
            happened.append(word)
            return act(*args)

        return both

    engine = dj.engine
    monkeypatch.setattr(engine, "glance", told("glance", some_glance(dj)))
    monkeypatch.setattr(engine, "guard", told("guard", engine.guard))
    monkeypatch.setattr(Executor, "advance", told("launch", Executor.advance))
    return happened


def some_glance(dj: djinn.Dj) -> Callable[[], None]:
    assert dj.engine.glance is not None
    return dj.engine.glance


def replaced(model: Any) -> Undo:
    layer, old = model.model.layers[0].self_attn.o_proj, model.model.layers[0].self_attn.o_proj.weight
    layer.weight = nn.Parameter(old.detach() * 2)
    return lambda: setattr(layer, "weight", old)


def moved(model: Any) -> Undo:
    weight = model.model.layers[1].mlp.up_proj.weight
    data = weight.data
    weight.data = data.clone()
    return lambda: setattr(weight, "data", data)


def turned(model: Any) -> Undo:
    weight = model.model.layers[0].self_attn.o_proj.weight
    data = weight.data
    weight.data = data.t()
    assert weight.shape == data.shape and weight.data_ptr() == data.data_ptr()  # only its strides tell
    return lambda: setattr(weight, "data", data)


def buffer(model: Any) -> Undo:
    rotary, old = model.model.rotary_emb, model.model.rotary_emb.inv_freq
    rotary.inv_freq = old.clone()
    return lambda: setattr(rotary, "inv_freq", old)


def added(model: Any) -> Undo:
    layer = model.model.layers[1]
    layer.extra = nn.Linear(2, 2)
    return lambda: delattr(layer, "extra")


CHANGES = pytest.mark.parametrize("change", [replaced, moved, turned, buffer, added])


def standing(run: Run) -> tuple[object, ...]:
    """All that a run that is refused must not change."""
    session = run.session
    tokens, journal = list(session.token_list), list(map(id, session.journal))
    limits = [point.left for point in run.breakpoints]
    return tokens, list(session.sampled), session.length, journal, len(run.records), run.finished, run.flight, limits


def refused(runs: list[Run], act: Callable[[], object]) -> None:
    """Driving the runs is refused, twice, and leaves them where they were."""
    before, stops = list(map(standing, runs)), [run.stop for run in runs]
    for _ in range(2):
        with pytest.raises(djinn.CaptureError, match="was moved or replaced"):
            act()
        assert list(map(standing, runs)) == before
        assert [run.stop for run in runs] == stops


def logits_of(dj: djinn.Dj, ids: Tensor = IDS) -> Tensor:
    with dj.session() as s:
        return bits_of(s.forward(ids).result())


@CHANGES
def test_a_refused_forward_goes_on_with_the_right_bits(
    made: tuple[djinn.Dj, Any], change: Callable[[Any], Undo]
) -> None:
    # Catches: what was computed between the looks is kept (turned: other bits), or a look is left out (all).
    dj, model = made
    expected = logits_of(dj)
    with dj.session() as s:
        run = s.forward(IDS)
        undo = change(model)
        try:
            refused([run], run.result)
        finally:
            undo()
        assert_same_bits(bits_of(run.result()), expected)


@CHANGES
def test_nobody_is_called_with_values_of_a_refused_run(
    made: tuple[djinn.Dj, Any], change: Callable[[Any], Undo]
) -> None:
    # Catches: a full look behind the first predicate, token, stop or count of a breakpoint.
    dj, model = made
    heard: list[object] = []

    def asked(value: Tensor) -> Tensor:
        heard.append(value)
        return value[0] > 1e9

    once = djinn.break_at("resid_post.1", positions=-1 + PROMPT, times=1)
    points = [djinn.break_at("resid_post.0", when=asked), once]
    options: Any = {"max_new_tokens": NEW, "output_logits": True, "breakpoints": points, "on_token": heard.append}
    with dj.session() as s:
        whole = s.generate(IDS, **options)
        expected = some(next(whole)).value.clone(), whole.result()
    with dj.session() as s:
        run = s.generate(IDS, **options)
        heard.clear()
        undo = change(model)
        try:
            refused([run], lambda: next(run))
            assert not heard
        finally:
            undo()
        assert_same_bits(next(run).value, expected[0])
        assert_same(run.result(), expected[1])
    assert heard


@CHANGES
@pytest.mark.parametrize("more", [None, [5, 6, 7]], ids=["no prompt", "a prompt"])
@pytest.mark.parametrize("first", ["forward", "generate"])
def test_a_session_that_goes_on_is_refused_as_a_new_one(
    made: tuple[djinn.Dj, Any], change: Callable[[Any], Undo], more: list[int] | None, first: str
) -> None:
    # Catches: a token drawn from what an earlier call left, or a cruise begun, before the full look.
    dj, model = made

    def begun(session: Session) -> Run:
        (session.forward(IDS) if first == "forward" else session.generate(IDS, max_new_tokens=2)).result()
        return session.generate(more, max_new_tokens=NEW, output_logits=True)

    with dj.session() as a, dj.session() as b:
        expected, run = begun(a).result(), begun(b)
        undo = change(model)
        try:
            refused([run], run.result)
        finally:
            undo()
        assert_same(run.result(), expected)


@CHANGES
def test_runs_that_begin_together_are_refused_together(
    made: tuple[djinn.Dj, Any], change: Callable[[Any], Undo]
) -> None:
    # Catches: only the run whose chunk was launched first is dropped, or looked at.
    dj, model = made
    expected = [logits_of(dj), logits_of(dj, prompt(9, 1))]
    for drive in (dj.results, lambda runs: list(dj.as_stopped(runs))):
        with dj.session() as a, dj.session() as b:
            runs = [a.forward(IDS), b.forward(prompt(9, 1))]
            undo = change(model)
            try:
                refused(runs, partial(drive, runs))
            finally:
                undo()
            for run, logits in zip(runs, expected, strict=True):
                assert_same_bits(bits_of(run.result()), logits)


@CHANGES
def test_beside_one_that_begins_a_run_stays_at_its_stop(
    made: tuple[djinn.Dj, Any], change: Callable[[Any], Undo]
) -> None:
    # Catches: a glance alone where another run of the call stands at a stop and leaves it.
    dj, model = made
    with dj.session() as s:
        run = s.forward(IDS, breakpoints=["resid_post.0"])
        next(run).value.neg_()
        expected = bits_of(run.result()), logits_of(dj)
    with dj.session() as a, dj.session() as b:
        runs = [a.forward(IDS, breakpoints=["resid_post.0"]), b.forward(IDS)]
        stop = next(runs[0])
        stop.value.neg_()
        undo = change(model)
        try:
            refused(runs, lambda: dj.results(runs))
        finally:
            undo()
        assert runs[0].stop is stop and stop.current
        for result, logits in zip(dj.results(runs), expected, strict=True):
            assert_same_bits(bits_of(result), logits)


def test_prompts_are_launched_between_a_glance_and_one_full_look(dj: djinn.Dj, looks: list[str]) -> None:
    # Catches: the full look before the launch again, one for each run of a call, or one for each chunk.
    with dj.session() as a, dj.session() as b:
        looks.clear()
        a.generate(IDS, max_new_tokens=2).result()
        assert looks[:3] == ["glance", "launch", "guard"] and looks.count("guard") == 1
        looks.clear()
        a.generate(max_new_tokens=2).result()
        assert looks == ["guard"]  # it decodes at once: there is nothing to launch before
        looks.clear()
        dj.results([session.generate(IDS, max_new_tokens=2) for session in (a, b)])
        assert looks[:4] == ["glance", "launch", "guard", "launch"] and looks.count("guard") == 1
        looks.clear()
        stop = next(a.forward(IDS[:3], breakpoints=["resid_post.0"]))
        assert looks == ["glance", "launch", "guard"]
        stop.run.result()
        assert looks == ["glance", "launch", "guard", "launch"]


def test_without_graphs_the_full_look_comes_first(
    dj: djinn.Dj, looks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Catches: a glance where segments read shapes and strides anew, which may be refused by torch in the middle.
    monkeypatch.setattr(dj.engine, "glance", None)
    with dj.session() as s:
        looks.clear()
        s.forward(IDS).result()
        assert looks[:2] == ["guard", "launch"] and looks.count("guard") == 1


def test_an_interrupt_of_the_full_look_costs_nothing(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    # Catches: a run that counts as looked at although the look was cut short.
    expected = logits_of(dj)
    guard, broken = dj.engine.guard, [True, True]

    def look() -> None:
        if broken:
            broken.pop()
            raise KeyboardInterrupt
        guard()

    with dj.session() as s:
        run = s.forward(IDS)
        monkeypatch.setattr(dj.engine, "guard", look)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run.result()
            assert not run.vouched and not s.journal
        assert_same_bits(bits_of(run.result()), expected)


def test_no_stage_is_made_over_weights_in_another_form(made: tuple[djinn.Dj, Any]) -> None:
    # Catches: a graph recorded between the looks, which would read the weights that way for ever.
    dj, model = made
    stages = dj.engine.executor.stages
    if stages is None:
        return
    expected = logits_of(dj)
    with dj.session() as s:
        run = s.forward(IDS)
        stages.keep(())
        undo = turned(model)
        try:
            refused([run], run.result)
            assert not stages._made
        finally:
            undo()
        assert_same_bits(bits_of(run.result()), expected)
    assert torch.equal(logits_of(dj), expected)
