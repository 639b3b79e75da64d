"""The decode loop over static buffers: the bits of single steps, steps launched ahead and none wasted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.program import Program
from djinn_fx.runtime.graphs import Runnable
from djinn_fx.runtime.loop import DecodeLoop
from djinn_fx.runtime.results import Result
from tests.bits import assert_same_bits
from tests.runtime.tiny import NEW, ROWS, SITES, another_dj, direction, generated, guarded, prompt

LONG = 12
PROMPTS = [prompt(length, seed) for seed, length in enumerate((7, 20, 3, 16))]


@pytest.fixture(scope="module", params=["gpt2", "llama-bf16"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[djinn.Dj, djinn.Dj]]:
    """One model on the decode loop, and the same model step by step; when a row joins may differ, its bits may not."""
    name: str = request.param
    loop = another_dj(name, backend="static", batch_invariant=True)
    yield loop, another_dj(name, backend="eager", batch_invariant=True)
    assert loop.engine.arena.free_rows == ROWS
    loop.close()


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    made = another_dj("gpt2", backend="static")
    yield from guarded(made)
    made.close()


def loop_of(dj: djinn.Dj) -> DecodeLoop:
    loop = dj.engine.executor.loop
    assert loop is not None
    return loop


class Counter:
    """Counts the steps that a loop's programs run."""

    def __init__(self, dj: djinn.Dj) -> None:
        self.runs = 0
        self.loop = loop_of(dj)

    def __enter__(self) -> Counter:
        inner = self.loop._run

        def run(part: Runnable) -> None:
            self.runs += 1
            inner(part)

        self.patch = mock.patch.object(self.loop, "_run", run)
        self.patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.stop()


def same(a: Result, b: Result) -> None:
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.finish_reason == b.finish_reason
    if a.logits is not None and b.logits is not None:
        assert_same_bits(a.logits, b.logits)
    assert list(a.cache) == list(b.cache)
    for name in a.cache:
        assert_same_bits(a.cache[name], b.cache[name])


EDITS = (
    djinn.Edit("resid_post.0", scale=0.5),
    djinn.Edit("resid_post.1", add=direction(1), positions="generated"),
    djinn.Edit("resid_post.0", ablate=direction(2), positions=[8, 9, 21]),
)


# -- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("edits", [(), EDITS[:1], EDITS[:2], EDITS[1:], EDITS[2:]], ids=len)
@pytest.mark.parametrize("options", [{}, {"output_logits": True}, {"do_sample": True}, {"capture": SITES}], ids=str)
def test_batches_have_the_bits_of_single_steps(
    pair: tuple[djinn.Dj, djinn.Dj], edits: tuple[djinn.Edit, ...], options: dict[str, Any]
) -> None:
    ours, theirs = (dj.generate(PROMPTS, max_new_tokens=LONG, edits=list(edits), **options) for dj in pair)
    for mine, other in zip(ours, theirs, strict=True):
        same(mine, other)


@pytest.mark.parametrize("name", ["gpt2", "llama-bf16"])
def test_rows_of_all_kinds_together(name: str) -> None:
    """One row is drawn, one captured, one stops at every token, one cruises along."""
    pair = [another_dj(name, backend=backend, batch_invariant=True) for backend in ("static", "eager")]

    def play(dj: djinn.Dj) -> tuple[list[list[int]], list[Tensor], Tensor]:
        sessions = [dj.session(seed) for seed in range(4)]
        calls: list[dict[str, Any]] = [{"do_sample": True}, {"capture": SITES}, {"breakpoints": ["resid_post.1"]}, {}]
        runs = [
            session.generate(ids, max_new_tokens=LONG, **call)
            for session, ids, call in zip(sessions, PROMPTS, calls, strict=True)
        ]
        seen = []
        for stop in dj.as_stopped(runs):
            if stop.phase == "generated":
                stop.value.mul_(0.5)
                seen.append(stop.value.clone())
        captured = runs[1].result().cache["resid_post.1"]
        tokens = [run.tokens.tolist() for run in runs]
        for session in sessions:
            session.close()
        return tokens, seen, captured

    (tokens, seen, captured), (others, theirs, wanted) = (play(dj) for dj in pair)
    assert tokens == others
    assert_same_bits(captured, wanted)
    assert len(seen) == len(theirs) == LONG - 1
    for a, b in zip(seen, theirs, strict=True):
        assert_same_bits(a, b)


def test_a_stopped_row_keeps_its_values_while_others_go_on(dj: djinn.Dj) -> None:
    whole = generated(dj, PROMPTS[0], capture=SITES)
    with dj.session() as a, dj.session(1) as b:
        run = a.generate(PROMPTS[0], max_new_tokens=NEW, breakpoints=["resid_post.0"])
        next(run)
        stop = next(run)
        b.generate(PROMPTS[1], max_new_tokens=LONG).result()
        later = stop.step()
        assert later is not None and later.site == "mlp_out.1"
        later = later.step()
        assert later is not None and later.site == "resid_post.1"
        assert_same_bits(later.value[0], whole.cache["resid_post.1"][stop.position])
        same(Result(run.result().tokens, None, whole.cache, "length"), whole)


# -- no step too many ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_token_costs_one_step(dj: djinn.Dj, rows: int) -> None:
    dj.generate(PROMPTS[:rows], max_new_tokens=2)
    with Counter(dj) as counter:
        dj.generate([ids[:5] for ids in PROMPTS[:rows]], max_new_tokens=LONG)
    assert counter.runs == LONG - 1


def test_eos_wastes_no_more_than_what_is_in_flight(dj: djinn.Dj) -> None:
    whole = generated(dj, PROMPTS[0], LONG).tokens[len(PROMPTS[0]) :].tolist()
    last = next(i for i in range(1, LONG) if whole[i] not in whole[:i])
    with Counter(dj) as counter:
        (result,) = dj.generate([PROMPTS[0]], max_new_tokens=40, stop_token_ids=[whole[last]])
    assert result.finish_reason == "stop_token"
    assert result.tokens[len(PROMPTS[0]) :].tolist() == whole[: last + 1]
    assert counter.runs <= last + 3


def test_a_row_that_stops_costs_the_others_no_step(dj: djinn.Dj) -> None:
    """Edited at every token, it rides in the others' steps: they take one step a token as if alone."""
    sessions = [dj.session(seed) for seed in range(4)]
    points = [["resid_post.0"], [], [], []]
    runs = [
        session.generate(ids[:5], max_new_tokens=LONG, breakpoints=at)
        for session, ids, at in zip(sessions, PROMPTS, points, strict=True)
    ]
    stops = 0
    with Counter(dj) as counter:
        for stop in dj.as_stopped(runs):
            stop.value.mul_(0.5)
            stops += 1
            if all(run.finished for run in runs[1:]):
                break
    assert stops >= LONG // 2
    assert counter.runs <= LONG + 3
    for session in sessions:
        session.close()


def test_tables_are_written_when_steering_changes_only(dj: djinn.Dj) -> None:
    lanes = loop_of(dj).lanes
    with dj.session() as s, mock.patch.object(lanes, "_write_edit", wraps=lanes._write_edit) as written:
        handle = s.steer("resid_post.0", scale=0.5)
        s.steer("resid_post.1", ablate=direction(3), positions="generated")
        run = s.generate(prompt(5), max_new_tokens=LONG, breakpoints=["resid_post.1"])
        for stop in run:
            if stop.position == 9:
                handle.strength = 0.5
    assert written.call_count == 3


def test_predicates_are_asked_once_a_step(dj: djinn.Dj) -> None:
    asked: list[torch.Size] = []

    def never(h: Tensor) -> Tensor:
        return h.sum() > 1e30

    def counted(spec: Any, values: Tensor) -> Tensor:
        asked.append(values.shape)
        return torch.zeros(values.shape[0], dtype=torch.bool)

    with dj.session() as s:
        run = s.generate(
            prompt(5), max_new_tokens=LONG, breakpoints=[djinn.break_at("resid_post.*", never, positions="generated")]
        )
        with mock.patch("djinn_fx.runtime.breakpoints.evaluate", counted):
            run.result()
    assert [shape[0] for shape in asked] == [], "a quiet run asks nobody"
    with dj.session() as s:
        run = s.generate(
            prompt(5), max_new_tokens=LONG, breakpoints=[djinn.break_at("resid_post.*", never, positions="generated")]
        )
        with mock.patch("djinn_fx.runtime.breakpoints.evaluate", counted):
            assert list(run) == []
    assert [shape[0] for shape in asked] == [2] * (LONG - 1)


def test_tokens_are_told_while_cruising(dj: djinn.Dj) -> None:
    told: list[int] = []
    with dj.session() as s:
        run = s.generate(prompt(5), max_new_tokens=LONG, on_token=told.append)
        run.result()
        assert told == run.tokens[5:].tolist()
    stopped: list[int] = []
    with dj.session() as s:

        def until_four(token: int) -> None:
            stopped.append(token)
            if len(stopped) == 4:
                run.close()

        run = s.generate(prompt(5), max_new_tokens=LONG, on_token=until_four)
        list(run)
        assert stopped == told[:4]
        assert run.finish_reason == "closed"
        assert s.tokens.tolist() == [*prompt(5).tolist(), *told[:4]]
        assert s.generate(None, max_new_tokens=3).result().tokens.tolist()[-3:] == told[4:7]


def test_an_error_in_on_token_loses_nothing(dj: djinn.Dj) -> None:
    whole = generated(dj, prompt(5), LONG).tokens.tolist()
    with dj.session() as s:
        calls: list[int] = []

        def fail(token: int) -> None:
            calls.append(token)
            if len(calls) == 5:
                raise RuntimeError("mine")

        run = s.generate(prompt(5), max_new_tokens=LONG, on_token=fail)
        with pytest.raises(RuntimeError, match="mine"):
            run.result()
        assert run.result().tokens.tolist() == whole


# -- agreement -----------------------------------------------------------------------------------


def test_variants_are_compared_when_they_are_made() -> None:
    with another_dj("gpt2", backend="static", verify=True) as dj:
        before = dj.receipt
        assert before is not None and before.exact
        assert len(before.checks) == 1
        with dj.session() as s:
            s.generate(prompt(5), max_new_tokens=3).result()
            s.generate(prompt(5), max_new_tokens=3, capture=["resid_post.0"]).result()
            assert "decode of 1 row (rank)" in dj.receipt.pending  # type: ignore[union-attr]
            s.steer("resid_post.0", ablate=direction(1))
            s.generate(prompt(5), max_new_tokens=3).result()
        dj.generate([prompt(5), prompt(6)], max_new_tokens=3)
        after = dj.receipt
        assert after is not None and after.exact
        names = [check.name for check in after.checks]
        for wanted in (
            "decode of 1 row: compiled = op by op",
            "decode of 1 row: plain = armed",
            "decode of 1 row: armed = rank",
            "decode of 1 row: stopped and resumed = uninterrupted",
            "decode of 2 rows: rows permuted",
            "prompt chunk of 16: plain = rank",
        ):
            assert wanted in names, names
        assert "compared when first needed" in str(after)


def test_a_compiler_that_makes_something_else_is_refused() -> None:
    with another_dj("gpt2", backend="static") as dj:
        agreements = dj.engine.programs.agreements
        assert agreements is not None

        def lie(program: Program) -> Program:
            last = program.segments[-1]
            wrong = replace(last, run=lambda *inputs: tuple(2 * each for each in last.run(*inputs)))
            return replace(program, segments=(*program.segments[:-1], wrong))

        with dj.session() as s, mock.patch("djinn_fx.runtime.agreement.as_graph", lie):
            for _ in range(2):  # asked again it is refused again
                with pytest.raises(djinn.CaptureMismatch, match=r"prompt chunk of 16.*backend='eager'"):
                    (s.run or s.generate(prompt(5), max_new_tokens=3)).result()


def test_a_variant_with_other_bits_takes_the_place_of_the_poorer_one() -> None:
    """Where plain and armed differ, armed runs from then on, and the receipt says so."""
    with another_dj("gpt2", backend="static", verify=True) as dj:
        agreements = dj.engine.programs.agreements
        assert agreements is not None
        with dj.session() as s, mock.patch.object(agreements, "_equal", lambda *_: False):
            s.generate(prompt(5), max_new_tokens=3).result()
            s.generate(prompt(5), max_new_tokens=3, capture=["resid_post.0"]).result()
        receipt = dj.receipt
        assert receipt is not None and not receipt.exact
        shape = next(each.shape for each in agreements.found if each.shape.query == 1)
        assert agreements.least(shape, "plain") == "armed"
        assert dj.engine.programs.get(shape, "plain", dj.engine.sites).variant == "armed"
