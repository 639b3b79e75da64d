"""Many prompts at once: a queue over the rows, runs driven together, and who they are in company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.runtime.run import Run
from tests.bits import assert_same_bits
from tests.runtime.tiny import (
    NEW,
    ROWS,
    TWO,
    another_dj,
    assert_same,
    direction,
    generated,
    guarded,
    model_of,
    prompt,
)

V = direction(1)
#: More than there are rows, of all lengths: one token, one chunk, more than two chunks.
PROMPTS = [prompt(length, seed) for seed, length in enumerate((7, 20, 1, 16, 37, 3, 12))]


def by_transformers(model: Any, ids: Tensor, new: int, **options: Any) -> list[int]:
    out: list[int] = model.generate(ids[None], max_new_tokens=new, do_sample=False, pad_token_id=0, **options)[
        0
    ].tolist()
    return out


@pytest.fixture(scope="module")
def eos() -> Iterator[tuple[Any, djinn.Dj, int]]:
    """A model whose EOS is what it says third after the second prompt."""
    model = model_of("llama")
    token = by_transformers(model, PROMPTS[1], 3)[-1]
    model.generation_config.eos_token_id = token
    try:
        dj = another_dj("llama")
    finally:
        model.generation_config.eos_token_id = None
    yield model, dj, token
    dj.close()


# -- dj.generate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dj", ["gpt2", "llama"], indirect=True)
@pytest.mark.parametrize("new", [1, 6])
def test_generate_says_what_transformers_says(dj: djinn.Dj, new: int) -> None:
    model = model_of("gpt2" if "transformer.wpe" in dj.sites.names else "llama")
    results = dj.generate(PROMPTS, max_new_tokens=new)
    assert [result.tokens.tolist() for result in results] == [by_transformers(model, ids, new) for ids in PROMPTS]
    assert {result.finish_reason for result in results} == {"length"} and results[0].logits is None


def test_eos_ends_a_row_and_frees_it(eos: tuple[Any, djinn.Dj, int]) -> None:
    model, dj, token = eos
    results = dj.generate(PROMPTS, max_new_tokens=9, output_logits=True)
    for ids, result in zip(PROMPTS, results, strict=True):
        assert result.tokens.tolist() == by_transformers(model, ids, 9, eos_token_id=token)
        ended = int(result.tokens[-1]) == token
        assert result.finish_reason == ("eos" if ended else "length")
        assert result.logits is not None and len(result.logits) == len(result.tokens) - len(ids)
    assert results[1].finish_reason == "eos" and len(results[1].tokens) <= 23
    assert len({result.finish_reason for result in results}) == 2


def test_stop_tokens_end_a_row(one: djinn.Dj) -> None:
    plain = one.generate(PROMPTS, max_new_tokens=6)
    stop = int(plain[4].tokens[len(PROMPTS[4]) + 2])
    results = one.generate(PROMPTS, max_new_tokens=6, stop_token_ids=iter([stop, 1]))
    for ids, whole, cut in zip(PROMPTS, plain, results, strict=True):
        new = whole.tokens[len(ids) :].tolist()
        kept = new[: new.index(stop) + 1] if stop in new else new
        assert cut.tokens[len(ids) :].tolist() == kept
        assert cut.finish_reason == ("stop_token" if stop in new else "length")


def test_a_full_session_ends_with_length(one: djinn.Dj) -> None:
    result = generated(one, prompt(62), 9)
    assert result.finish_reason == "length" and len(result.tokens) == 65
    with one.session() as s:
        s.generate(prompt(62), max_new_tokens=9).result()
        acts: list[Callable[[], Run]] = [lambda: s.generate(max_new_tokens=1), lambda: s.forward(prompt(1))]
        for act in acts:
            with pytest.raises(djinn.CapacityError, match=r"session is full.*max_length=64"):
                act()


def test_edits_are_one_list_for_all_or_one_per_prompt(one: djinn.Dj) -> None:
    add, turn = djinn.Edit("resid_post.0", add=V), djinn.Edit("resid_post.1", ablate=V, positions="generated")

    def alone(ids: Tensor, *edits: djinn.Edit) -> list[int]:
        with one.session() as s:
            for edit in edits:
                s.steer(edit)
            return s.generate(ids, max_new_tokens=5).result().tokens.tolist()

    shared = one.generate(PROMPTS, max_new_tokens=5, edits=[add, turn])
    assert [result.tokens.tolist() for result in shared] == [alone(ids, add, turn) for ids in PROMPTS]
    each = [[add], [], [turn], [add, turn], [], [], [turn]]
    own = one.generate(PROMPTS, max_new_tokens=5, edits=each)
    assert [result.tokens.tolist() for result in own] == [
        alone(ids, *edits) for ids, edits in zip(PROMPTS, each, strict=True)
    ]
    assert [result.tokens.tolist() for result in own] != [result.tokens.tolist() for result in shared]


def test_seeds_capture_and_on_token(one: djinn.Dj) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "temperature": 2.0}
    results = one.generate(
        PROMPTS,
        seeds=[9] * 7,
        capture=["resid_post.*"],
        on_token=lambda index, token: told.append((index, token)),
        **options,
    )
    assert one.generate(PROMPTS, **options)[0].tokens.tolist() != results[0].tokens.tolist()
    for index, (ids, result) in enumerate(zip(PROMPTS, results, strict=True)):
        with one.session(seed=9) as s:
            alone = s.generate(ids, capture=["resid_post.*"], **options).result()
        assert alone.tokens.tolist() == result.tokens.tolist()
        assert [token for row, token in told if row == index] == result.tokens[len(ids) :].tolist()
        assert result.cache["resid_post.1"].shape == (len(ids) + 4, 32)
        torch.testing.assert_close(result.cache["resid_post.1"], alone.cache["resid_post.1"], rtol=1e-5, atol=1e-5)


def test_a_breakpoint_ends_its_row(one: djinn.Dj) -> None:
    plain = one.generate(PROMPTS, max_new_tokens=5)
    loud = djinn.break_at("resid_post.1", lambda h: h[0] > 1.5, positions="generated")
    # An iterator serves all rows, not only the first.
    results = one.generate(PROMPTS, max_new_tokens=5, breakpoints=iter([loud]), capture=iter(["resid_post.1"]))
    assert {result.finish_reason for result in results} == {"length", "breakpoint"}
    for ids, whole, cut in zip(PROMPTS, plain, results, strict=True):
        with one.session() as s:
            places = [stop.position for stop in s.generate(ids, max_new_tokens=5, breakpoints=[loud])]
        assert cut.finish_reason == ("breakpoint" if places else "length")
        # The step that stopped was not committed: its token is there, its captured value is not.
        kept = places[0] + 1 if places else len(whole.tokens)
        assert cut.tokens.tolist() == whole.tokens[:kept].tolist()
        assert len(cut.cache["resid_post.1"]) == kept - 1


def test_a_failing_callback_leaves_nothing_behind(one: djinn.Dj) -> None:
    def fail(index: int, token: int) -> None:
        if index == 5:
            raise ZeroDivisionError

    with one.session() as s:
        run = s.generate(prompt(20), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        next(run)
        with pytest.raises(ZeroDivisionError):
            one.generate(PROMPTS, max_new_tokens=5, on_token=fail)
        assert one.engine.sessions == [s]
        assert_same(run.result(), generated(one, prompt(20)))


def test_inputs_of_generate(one: djinn.Dj) -> None:
    lists = [ids.tolist() for ids in PROMPTS[:2]]
    padded = torch.tensor([[0] * 13 + lists[0], lists[1]])
    mask = torch.tensor([[0] * 13 + [1] * 7, [1] * 20])
    expected = [result.tokens.tolist() for result in one.generate(lists, max_new_tokens=3)]
    for inputs in (
        PROMPTS[:2],
        {"input_ids": padded, "attention_mask": mask},
        {"input_ids": padded.flip(-1).flip(-1).tolist(), "attention_mask": mask.tolist()},
        [{"input_ids": [row]} for row in lists],
    ):
        assert [result.tokens.tolist() for result in one.generate(inputs, max_new_tokens=3)] == expected
    (single,) = one.generate(PROMPTS[0], max_new_tokens=3)
    assert single.tokens.tolist() == expected[0]


# -- as_stopped and results ----------------------------------------------------------------------


def begin(dj: djinn.Dj, seeds: range = range(3), **options: Any) -> list[Run]:
    sessions = [dj.session(seed=seed) for seed in seeds]
    return [s.generate(prompt(6, s.seed), max_new_tokens=NEW, output_logits=True, **options) for s in sessions]


def end(runs: list[Run]) -> None:
    for run in runs:
        run.session.close()


def test_all_stops_of_a_step_come_in_the_order_given(one: djinn.Dj) -> None:
    runs = begin(one, breakpoints=["resid_post.0", "resid_post.1"])
    runs.reverse()
    seen = []
    for stop in one.as_stopped(runs):
        assert all(run.stop is not None or run.finished for run in runs), "a step ran while the caller was in control"
        seen.append((runs.index(stop.run), stop.position, stop.site))
    # A step is what lies between two yields of the same run: each run comes once before any comes again.
    places = [(p, site) for p in (5, 6, 7, 8) for site in ("resid_post.0", "resid_post.1")]
    assert seen == [(index, *place) for place in places for index in range(3)]
    end(runs)


def test_driven_together_is_driven_alone(one: djinn.Dj) -> None:
    for seed, together in enumerate(driven(one)):
        alone = generated(one, prompt(6, seed))
        assert together.tokens.tolist() == alone.tokens.tolist()
        torch.testing.assert_close(together.logits, alone.logits, rtol=1e-5, atol=1e-5)


def driven(dj: djinn.Dj) -> list[Any]:
    runs = begin(dj, breakpoints=["resid_post.1"])
    for stop in dj.as_stopped(runs):
        stop.value.mul_(-2).mul_(-0.5)
    results = dj.results(runs)
    end(runs)
    return results


def test_held_runs_wait_and_released_ones_go_on(one: djinn.Dj) -> None:
    runs = begin(one, breakpoints=["resid_post.0"])
    held = None
    for stop in one.as_stopped(runs):
        if stop.run is runs[1] and stop.position == 6:
            stop.hold()
            held = stop
    assert [run.finished for run in runs] == [True, False, True] and held is not None and held.current
    assert list(one.as_stopped(runs)) == []
    held.release()
    rest = [(stop.run, stop.position) for stop in one.as_stopped(runs)]
    assert rest == [(runs[1], 7), (runs[1], 8)]
    assert runs[1].result().tokens.tolist() == generated(one, prompt(6, 1)).tokens.tolist()
    end(runs)


def test_stops_not_yet_yielded_are_not_lost(one: djinn.Dj) -> None:
    runs = begin(one, breakpoints=["resid_post.0"])
    for stop in one.as_stopped(runs):
        assert stop.run is runs[0]
        break
    seen = [(runs.index(stop.run), stop.position) for stop in one.as_stopped(runs)]
    assert seen[:2] == [(1, 5), (2, 5)] and len(seen) == 11
    end(runs)


def test_runs_may_be_rewound_and_forked_while_driven(one: djinn.Dj) -> None:
    runs = begin(one, range(2), breakpoints=["resid_post.1"])
    seen = []
    for stop in one.as_stopped(runs):
        seen.append((runs.index(stop.run), stop.position))
        if len(seen) == 3:
            runs[1].rewind(2, "resid_post.0")
            (fork,) = stop.fork()
    assert seen == [(0, 5), (1, 5), (0, 6), (0, 7), (1, 5), (0, 8), (1, 6), (1, 7), (1, 8)]
    assert fork.run.result().tokens.tolist() == runs[0].result().tokens.tolist()
    end(runs)


@TWO
def test_results_pass_over_breakpoints_but_not_over_edits(dj: djinn.Dj) -> None:
    runs = begin(dj, breakpoints=["resid_post.0"])
    for run in runs[:2]:
        next(run).value.add_(1)
    together = dj.results(runs)
    end(runs)
    for seed, result in enumerate(together):
        with dj.session() as s:
            run = s.generate(prompt(6, seed), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
            if seed < 2:
                next(run).value.add_(1)
            assert_same_bits(run.result().logits[:1], result.logits[:1])  # type: ignore[index]


def test_every_row_driven_together(one: djinn.Dj) -> None:
    runs = begin(one, range(ROWS))
    assert [result.finish_reason for result in one.results(runs)] == ["length"] * ROWS
    end(runs)


def test_nothing_is_left(one: djinn.Dj) -> None:
    for _ in guarded(one):
        one.generate(PROMPTS[:2], max_new_tokens=1)
