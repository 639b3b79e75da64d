"""Mistakes in calls: prompts, sampling, predicates, rows, runs; each says what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.session import Session
from tests.bits import assert_same_bits
from tests.runtime.mistakes import Case, begin, beside_another, fails
from tests.runtime.tiny import (
    LENGTH,
    compiled,
    direction,
    logits_of,
    prompt,
)

V = direction(1)


@pytest.fixture
def dj(one: djinn.Dj) -> Iterator[djinn.Dj]:
    yield from beside_another(one)


# -- prompts -------------------------------------------------------------------------------------

FORMS = r"give a str, a list of ints, a LongTensor \[T\] or \[1, T\], or a mapping with 'input_ids'"
MASK = {"input_ids": [[3, 4, 5]]}
PROMPTS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": ([], djinn.InvalidValue, "prompt is empty"),
    "empty tensor": (torch.zeros(1, 0, dtype=torch.int64), djinn.InvalidValue, "prompt is empty"),
    "all pads": (MASK | {"attention_mask": [[0, 0, 0]]}, djinn.InvalidValue, "prompt is empty"),
    "text": ("hello", djinn.InvalidValue, r"text needs a tokenizer: djinn.compile\(model, tokenizer=...\)"),
    "large": ([3, 64], djinn.InvalidValue, "token id 64 is outside the vocabulary of 64"),
    "negative": (torch.tensor([-1]), djinn.InvalidValue, "token id -1 is outside the vocabulary"),
    "floats": (
        torch.ones(3),
        djinn.InvalidValue,
        r"must be integers of shape \[T\] or \[B, T\], got torch.float32 \(3,\)",
    ),
    "bools": (torch.ones(3).bool(), djinn.InvalidValue, r"must be integers .* got torch.bool \(3,\)"),
    "three axes": (torch.ones(1, 1, 3).long(), djinn.InvalidValue, r"must be integers .* \(1, 1, 3\)"),
    "list of floats": ([3.0, 4.0], djinn.InvalidValue, f"cannot read float as a prompt; {FORMS}"),
    "object": (object(), djinn.InvalidValue, f"cannot read object as a prompt; {FORMS}"),
    "mapping": ({"ids": [3]}, djinn.InvalidValue, r"no 'input_ids' \(keys: ids\)"),
    "mask": (MASK | {"attention_mask": [[1, 1]]}, djinn.InvalidValue, "attention_mask and input_ids differ in shape"),
    "hole": (MASK | {"attention_mask": [[1, 0, 1]]}, djinn.InvalidValue, "pads may stand left or right only"),
    "long": (prompt(LENGTH + 1), djinn.CapacityError, f"has 65 tokens.*max_length={LENGTH}"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(dj: djinn.Dj, name: str) -> None:
    inputs, error, message = PROMPTS[name]
    for act in (
        lambda dj, s: s.generate(inputs, max_new_tokens=1),
        lambda dj, s: s.forward(inputs),
        lambda dj, s: dj(inputs),
        lambda dj, s: dj.run_with_cache(inputs),
        lambda dj, s: dj.generate(inputs, max_new_tokens=1),
    ):
        fails(dj, (act, error, message))


def test_one_prompt_for_one_session(dj: djinn.Dj) -> None:
    message = r"one prompt was expected, but the input holds 2. Use dj.generate\(prompts\) or dj\(inputs\)"
    for inputs in (torch.ones(2, 3).long(), [[3], [4, 5]]):
        fails(dj, (lambda dj, s: s.forward(inputs), djinn.InvalidValue, message))  # noqa: B023
    fails(dj, (lambda dj, s: s.forward(None), djinn.InvalidValue, "prompt is empty. Give at least one token"))
    fails(dj, (lambda dj, s: s.generate(max_new_tokens=1), djinn.InvalidValue, "only generate.. on a session that"))


def test_a_prompt_that_no_longer_fits(dj: djinn.Dj) -> None:
    with dj.session() as s:
        plain = logits_of(s, prompt(60))
        with pytest.raises(djinn.CapacityError, match=r"has 5 tokens, but this session has room for 4 .*60 used"):
            s.forward(prompt(5))
        assert len(s.tokens) == 60
        assert_same_bits(s.generate(max_new_tokens=1, output_logits=True).result().logits, plain[-1:])


# -- calls ---------------------------------------------------------------------------------------


def closed_run(dj: djinn.Dj, s: Session) -> Any:
    run = begin(s)
    run.close()
    return run


CALLS: dict[str, Case] = {
    "max_new_tokens": (
        lambda dj, s: begin(s, max_new_tokens=0),
        djinn.InvalidValue,
        "max_new_tokens=0: give a whole number, 1 or more",
    ),
    "temperature": (
        lambda dj, s: begin(s, do_sample=True, temperature=-1.0),
        djinn.InvalidValue,
        "temperature=-1.0: must be a finite number above 0",
    ),
    "temperature 0": (
        lambda dj, s: begin(s, do_sample=True, temperature=0.0),
        djinn.InvalidValue,
        "for the most likely token say do_sample=False",
    ),
    "top_k": (
        lambda dj, s: begin(s, do_sample=True, top_k=0),
        djinn.InvalidValue,
        "top_k=0: must be an integer of 1 or more",
    ),
    "top_p": (
        lambda dj, s: begin(s, do_sample=True, top_p=1.5),
        djinn.InvalidValue,
        "top_p=1.5: must be above 0 and at most 1",
    ),
    "no sampling": (
        lambda dj, s: begin(s, top_p=0.5),
        djinn.InvalidValue,
        "only act when sampling: add do_sample=True",
    ),
    "seed": (
        lambda dj, s: dj.session(seed=2**63),
        djinn.InvalidValue,
        r"seed=9223372036854775808: give an integer of 64",
    ),
    "seed type": (lambda dj, s: dj.session(seed="0"), djinn.InvalidValue, "seed='0': give an integer"),  # type: ignore[arg-type]
    "fork seeds": (
        lambda dj, s: next(begin(s, "resid_post.0")).fork(2, [1, 0.5]),  # type: ignore[list-item]
        djinn.InvalidValue,
        "seed=0.5: give an integer",
    ),
    "seeds": (
        lambda dj, s: dj.generate([[3], [4]], max_new_tokens=1, seeds=[1]),
        djinn.InvalidValue,
        "1 seeds for 2 prompts; give one each",
    ),
    "edits": (
        lambda dj, s: dj.generate([[3], [4]], max_new_tokens=1, edits=[[djinn.Edit("resid_post.0")]]),
        djinn.InvalidValue,
        "one list of Edits for all prompts, or 2 lists, one per prompt",
    ),
    "one bad prompt": (
        lambda dj, s: dj.generate([[3], [4], [99]], max_new_tokens=1),
        djinn.InvalidValue,
        "token id 99",
    ),
    "one bad edit": (
        lambda dj, s: dj.generate([[3], [4]], max_new_tokens=1, edits=[[], [djinn.Edit("resid_post.9")]]),
        djinn.UnknownSite,
        "resid_post.9",
    ),
    "two edits at a site": (
        lambda dj, s: dj.generate(
            [[3]], max_new_tokens=1, edits=[djinn.Edit("resid_post.0", scale=2.0), djinn.Edit("resid_pre.1", add=V)]
        ),
        djinn.InvalidValue,
        r"two Edits at 'resid_post.0', of which only one would act. Put both into one Edit",
    ),
    "edits of no Edit": (
        lambda dj, s: dj.generate([[3]], max_new_tokens=1, edits=[["resid_post.0"]]),  # type: ignore[arg-type]
        djinn.InvalidValue,
        "edits: 'resid_post.0' is no djinn.Edit",
    ),
    "hooks of no pair": (
        lambda dj, s: dj.run_with_hooks([3], ["resid_post.0"]),  # type: ignore[list-item]
        djinn.InvalidValue,
        "'resid_post.0' is no pair of a site's name and a function",
    ),
    "hook before site": (
        lambda dj, s: dj.run_with_hooks([3], [(torch.relu, "resid_post.0")]),  # type: ignore[list-item]
        djinn.InvalidValue,
        "is no pair of a site's name and a function",
    ),
    "hook of no tensor": (
        lambda dj, s: dj.run_with_hooks([3], [("resid_post.0", lambda value: "x")]),  # type: ignore[list-item, return-value]
        djinn.InvalidValue,
        "the hook at 'resid_post.0' returned str; expected a tensor, or None",
    ),
    "site of no name": (
        lambda dj, s: dj.run_with_cache([3], "resid_post")[1]["resid_post", "0"],  # type: ignore[index]
        djinn.InvalidValue,
        r"a site is named by a str, such as 'resid_post.1', not by \('resid_post', '0'\)",
    ),
    "a filter for sites": (
        lambda dj, s: dj.run_with_cache([3], lambda name: True),  # type: ignore[arg-type]
        djinn.InvalidValue,
        "sites are named by a str or a list of them",
    ),
    "a role in a cache": (
        lambda dj, s: dj.run_with_cache([3], "resid_post")[1]["resid_post"],
        djinn.UnknownSite,
        r"'resid_post' stands for \d sites, but this takes one",
    ),
    "one run for a list": (
        lambda dj, s: dj.results(begin(s, "resid_post.0")),  # type: ignore[arg-type]
        djinn.InvalidValue,
        r"this is one run: give \[run\]",
    ),
    "stops for runs": (
        lambda dj, s: dj.as_stopped([next(begin(s, "resid_post.0"))]),  # type: ignore[list-item]
        djinn.InvalidValue,
        "entry 0 is a Stop. Give its run: stop.run",
    ),
    "step": (
        lambda dj, s: next(begin(s, "resid_post.0")).step(tokens=-1),
        djinn.InvalidValue,
        "give 1 or more, or nothing",
    ),
    "rewind before": (
        lambda dj, s: begin(s).rewind(0),
        djinn.InvalidValue,
        r"rewind\(position=0\): .* computed nothing yet",
    ),
    "rewind beyond": (
        lambda dj, s: next(begin(s, "resid_post.0")).run.rewind(4),
        djinn.InvalidValue,
        "covers positions 0 to 3 so far; positions are absolute and 0-based",
    ),
    "rewind negative": (lambda dj, s: next(begin(s, "resid_post.0")).run.rewind(-1), djinn.InvalidValue, "position=-1"),
    "times": (lambda dj, s: djinn.break_at("resid_post.0", times=0), djinn.InvalidValue, "times must be 1 or more"),
    "when": (lambda dj, s: djinn.break_at("resid_post.0", when=3), djinn.InvalidValue, "must be callable, got 3"),  # type: ignore[arg-type]
    "closed run": (
        lambda dj, s: dj.results([closed_run(dj, s)]),
        djinn.InvalidValue,
        r"a run was abandoned with close\(\); leave it out",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(dj: djinn.Dj, name: str) -> None:
    fails(dj, CALLS[name])


def test_a_name_is_neither_a_model_nor_a_tokenizer() -> None:
    with pytest.raises(djinn.CaptureError, match=r"cannot compile 'gpt2': str is not a torch.nn.Module; load"):
        djinn.compile("gpt2")  # type: ignore[call-overload]
    with pytest.raises(djinn.InvalidValue, match=r"tokenizer='gpt2': give the tokenizer itself"):
        djinn.compile(torch.nn.Identity(), tokenizer="gpt2")  # type: ignore[call-overload]


def test_one_edit_for_all(dj: djinn.Dj) -> None:
    edit = djinn.Edit("resid_post.0", scale=2.0)
    alone, listed = (
        dj.generate([[3], [4]], max_new_tokens=2, edits=given, output_logits=True) for given in (edit, [edit])
    )
    for one, other in zip(alone, listed, strict=True):
        assert one.logits is not None and other.logits is not None
        assert_same_bits(one.logits, other.logits)


def test_runs_named_twice_or_of_another_model(dj: djinn.Dj) -> None:
    other = compiled("gpt2")
    with dj.session() as a, other.session() as b:
        mine, theirs = begin(a), begin(b)
        for drive in (dj.as_stopped, dj.results):
            with pytest.raises(djinn.InvalidValue, match="a run is named twice; give each run once"):
                drive([mine, mine])
            with pytest.raises(djinn.InvalidValue, match="belongs to another compiled model; drive each model's runs"):
                drive([mine, theirs])
        assert not mine.finished and mine.result().finish_reason == "length"


def test_an_older_run_is_not_rewound(dj: djinn.Dj) -> None:
    with dj.session() as s:
        old = s.forward(prompt(3))
        old.result()
        new = s.generate(prompt(3), max_new_tokens=2)
        with pytest.raises(djinn.StaleStop, match="the session has a newer run; rewind that one"):
            old.rewind(1)
        new.result()
        with pytest.raises(djinn.InvalidValue, match="covers positions 3 to 6"):
            new.rewind(1)


def test_no_row_left(dj: djinn.Dj) -> None:
    sessions = [dj.session() for _ in range(dj.engine.options.max_sessions)]
    for session in sessions:
        session.pin()
    for act in (dj.session, lambda: dj.generate([[3]], max_new_tokens=1)):
        with pytest.raises(djinn.CapacityError, match=r"[Cc]lose or offload\(\) .*compile with a larger max_sessions"):
            act()
    with pytest.raises(djinn.CapacityError, match=r"Close or offload\(\) a session"):
        dj.restore(sessions[0].checkpoint())
    for session in sessions:
        session.close()
