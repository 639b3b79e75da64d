"""Decode steps that run again from where they changed: the same bits, and not more than has to run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx

import djinn_fx as djinn
from djinn_fx.runtime.graphs import Replayed, Runnable
from djinn_fx.runtime.loop import DecodeLoop
from djinn_fx.runtime.remainder import behind
from tests.bits import assert_same_bits
from tests.runtime.tiny import direction, logits_of, model_of, prompt, some

#: Tokens of each run.
NEW = 6

Act = Callable[[djinn.Dj, djinn.Stop], None]


def nothing(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Leave it as it is."""


def scaled(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Write to the value."""
    stop.value.mul_(-1.5)


def assigned(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Put another tensor in the value's place."""
    stop.value = stop.value + 0.25


def steered(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Change what the next layer does."""
    stop.session.steer("resid_post.1", scale=1.0 + stop.position / 8)


def ablated(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """The same by an edit that another program has."""
    stop.session.steer("resid_post.1", ablate=direction(stop.position))


def offloaded(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Move the session away, and write to the value."""
    with dj.engine.lock:
        dj.engine.offload(stop.session)
    scaled(dj, stop)


def checkpointed(dj: djinn.Dj, stop: djinn.Stop) -> None:
    """Let another session run from here, then write to the value."""
    with dj.restore(stop.checkpoint()) as other:
        assert other.run is not None
        other.run.result()
    scaled(dj, stop)


def everything(dj: djinn.Dj, act: Act, sites: list[str], every: int = 1) -> tuple[list[int], Tensor, list[Tensor]]:
    """Tokens, logits and taps of a run that stops at ``sites`` and does something at each ``every``-th stop."""
    with dj.session() as session:
        points = [djinn.break_at(site, positions="generated") for site in sites]
        run = session.generate(
            prompt(7), max_new_tokens=NEW, breakpoints=points, output_logits=True, capture=["resid_post.*"]
        )
        for number, stop in enumerate(run):
            if number % every == 0:
                act(dj, stop)
        result = run.result()
    assert result.logits is not None
    return result.tokens.tolist(), result.logits, [result.cache[name] for name in sorted(result.cache)]


@contextmanager
def begins() -> Iterator[list[int]]:
    """The segments with which steps begin."""
    found: list[int] = []
    inner = Replayed.part

    def part(self: Replayed, first: int = 0) -> Runnable:
        found.append(first)
        return inner(self, first)

    with mock.patch.object(Replayed, "part", part):
        yield found


@pytest.mark.parametrize("sites", [["resid_post.0"], ["resid_post.1"], ["resid_post.0", "resid_post.1"]], ids="+".join)
@pytest.mark.parametrize(
    "act", [nothing, scaled, assigned, steered, ablated, offloaded, checkpointed], ids=lambda act: act.__name__
)
@pytest.mark.parametrize("every", [1, 3])
def test_bits_stay(pair: tuple[djinn.Dj, djinn.Dj], act: Act, sites: list[str], every: int) -> None:
    ours, theirs = (everything(dj, act, sites, every) for dj in pair)
    assert ours[0] == theirs[0]
    assert_same_bits(ours[1], theirs[1])
    for mine, other in zip(ours[2], theirs[2], strict=True):
        assert_same_bits(mine, other)


@pytest.mark.parametrize(("act", "again"), [(nothing, 0), (scaled, NEW - 1), (assigned, NEW - 1), (offloaded, 0)])
def test_only_what_changed_runs_again(pair: tuple[djinn.Dj, djinn.Dj], act: Act, again: int) -> None:
    """An edited step begins behind the layers before it, once for each token; not if its KV was away meanwhile."""
    with begins() as found:
        everything(pair[0], act, ["resid_post.1"])
    assert sum(first > 0 for first in found) == again


def test_the_second_edit_of_a_step_begins_at_its_own_layer(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    with begins() as found:
        everything(pair[0], scaled, ["resid_post.0", "resid_post.1"])
    assert [first for first in found if first] == [1, 2] * (NEW - 1)


def test_a_batch_begins_where_the_first_of_its_rows_changed(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """Two rows stop in one step, are edited at different layers, and run again together."""
    results, started = [], []
    for dj in pair:
        with dj.session() as one, dj.session() as two, begins() as found:
            runs = [
                session.generate(
                    prompt(7, seed),
                    max_new_tokens=NEW,
                    breakpoints=[djinn.break_at(f"resid_post.{seed}", positions="generated")],
                    output_logits=True,
                )
                for seed, session in enumerate((one, two))
            ]
            for stop in dj.as_stopped(runs):
                stop.value.mul_(0.5)
            results.append([run.result() for run in runs])
            started.append(found)
    assert {1, 2} >= {first for first in started[0] if first} > set()
    assert not started[1]  # step by step there are no such runs
    for mine, other in zip(*results, strict=True):
        assert mine.tokens.tolist() == other.tokens.tolist()
        assert_same_bits(mine.logits, other.logits)


def test_a_poisoned_stretch_before_the_edit_is_not_read(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """What is left out is really left out: its values may be anything by then."""
    dj = pair[0]
    wanted = everything(dj, scaled, ["resid_post.1"])
    inner = Replayed.part

    def part(self: Replayed, first: int = 0) -> Runnable:
        if first:
            kept = {name for segment in self.program.segments[first:] for name in segment.inputs}
            for segment in self.program.segments[:first]:
                for name in segment.outputs:
                    if name not in kept and self.values[name].is_floating_point():
                        self.values[name].fill_(torch.nan)
        return inner(self, first)

    with mock.patch.object(Replayed, "part", part):
        found = everything(dj, scaled, ["resid_post.1"])
    assert found[0] == wanted[0]
    assert_same_bits(found[1], wanted[1])


def test_a_prompt_that_changed_is_not_taken_over(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """The same token at the same place of the same row, but its prompt was rewound to and edited meanwhile."""
    results = []
    for dj in pair:
        with dj.session() as session:
            points = [djinn.break_at("resid_post.1", positions="generated")]
            run = session.generate(prompt(7), max_new_tokens=2, output_logits=True, breakpoints=points)
            token = next(run).session.token_list[-1]
            run.rewind(6, "resid_post.0").value.mul_(1.02)
            session.steer("resid_post.1", scale=1.25, positions="generated")
            assert next(run).session.token_list[-1] == token
            results.append(run.result())
    assert_same_bits(results[0].logits, results[1].logits)


def test_a_replay_sees_weights_that_changed(pair: tuple[djinn.Dj, djinn.Dj], request: pytest.FixtureRequest) -> None:
    """Rewound within its step, an edited step is run again as a whole, under the weights as they are."""
    weight = model_of(request.node.callspec.params["pair"]).get_input_embeddings().weight.data
    before, values = weight.clone(), []
    for dj in pair:
        try:
            with dj.session() as session:
                run = session.generate(prompt(7), max_new_tokens=3, breakpoints=["resid_post.0"])
                next(run)
                stop = some(next(run))
                stop.value.mul_(-1.5)
                assert some(stop.step()).position == stop.position
                weight.neg_()
                values.append(run.rewind(7, "attn_q.0").value.clone())
        finally:
            weight.copy_(before)
    assert_same_bits(values[0], values[1])


def test_a_launch_that_is_interrupted_leaves_values_to_others(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """Ctrl-C while another session's step is looked at takes nothing from a session that stands in the middle."""
    values = []
    for dj in pair:
        with dj.session() as one, dj.session() as two:
            points = [djinn.break_at("resid_post.*", positions="generated")]
            run = one.generate(prompt(7), max_new_tokens=3, breakpoints=points)
            other = two.generate(prompt(7, 1), max_new_tokens=3, breakpoints=["resid_post.1"])
            next(run)
            next(other)
            asked = mock.patch("djinn_fx.runtime.remainder.first_changed", side_effect=KeyboardInterrupt)
            with asked, suppress(KeyboardInterrupt):
                next(other)
            next(other)
            values.append(next(run).value.clone())
    assert_same_bits(values[0], values[1])


def test_a_step_that_ran_before_an_interrupt_is_not_taken_for_the_one_before(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """Ctrl-C right after the second step of a run that nobody watches, which is steered and goes on from the first."""
    inner, ran = DecodeLoop._run, 0

    def run(self: DecodeLoop, part: Runnable) -> None:
        nonlocal ran
        inner(self, part)
        ran += 1
        if ran == 2:
            raise KeyboardInterrupt

    results = []
    for dj in pair:
        with dj.session() as session:
            session.steer("resid_post.0", scale=1.5, positions="generated")
            going = session.generate(prompt(7), max_new_tokens=NEW)
            if dj is pair[0]:
                with mock.patch.object(DecodeLoop, "_run", run), pytest.raises(KeyboardInterrupt):
                    going.result()
            session.steer("resid_post.1", scale=-2.0, positions="generated")
            results.append((going.result().tokens.tolist(), logits_of(session, prompt(3))))
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


def test_a_step_of_inference_mode_is_run_again_outside_it(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    results = []
    for dj in pair:
        with dj.session() as session:
            points = [djinn.break_at("resid_post.1", positions="generated")]
            run = session.generate(prompt(7), max_new_tokens=3, output_logits=True, breakpoints=points)
            next(run)
            with torch.inference_mode():
                run.rewind(7, "resid_post.0")
            for stop in (some(run.stop), next(run)):
                stop.value.mul_(-1.5)
            results.append(run.result())
    assert results[0].tokens.tolist() == results[1].tokens.tolist()
    assert_same_bits(results[0].logits, results[1].logits)


def test_remainders_are_bounded(pair: tuple[djinn.Dj, djinn.Dj]) -> None:
    """One graph is kept, two are needed in turns: each is made anew, and the bits stay."""
    sites, loop = ["resid_post.0", "resid_post.1"], pair[0].engine.executor.loop
    assert loop is not None
    for replayed in loop._ready.values():
        replayed._rests.clear()
    with mock.patch("djinn_fx.runtime.graphs.REMAINDERS", 1):
        ours = everything(pair[0], scaled, sites)
    assert max(len(replayed._rests) for replayed in loop._ready.values()) == 1
    theirs = everything(pair[1], scaled, sites)
    assert ours[0] == theirs[0]
    assert_same_bits(ours[1], theirs[1])


@pytest.mark.parametrize("beside", ["nothing", "handed on", "twice", "written"])
def test_a_value_is_replaced_behind_its_site_only_where_its_segment_makes_nothing_else_of_it(beside: str) -> None:
    """Else that would keep what was made of the value as it was; a tap would too, which no segment hands on."""
    graph = fx.Graph()
    value = graph.call_function(torch.neg, (graph.placeholder("x"),))
    tap, more = graph.placeholder("tap"), []
    if beside == "written":
        graph.call_method("copy_", (tap, value))
    elif beside == "handed on":
        more = [graph.call_function(torch.exp, (value,))]
    elif beside == "twice":
        more = [value]
    graph.output((value, *more))
    outputs = ("resid_post.0", *("v" for _ in more))
    first: Any = SimpleNamespace(index=0, outputs=outputs, graph=fx.GraphModule(torch.nn.Module(), graph))
    program: Any = SimpleNamespace(segments=[first, SimpleNamespace(index=1, outputs=("logits",))])
    site: Any = SimpleNamespace(name="resid_post.0")
    assert behind(program, site) == (1 if beside == "nothing" else None)
