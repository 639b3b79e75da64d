"""Several calls on one session, and calls abandoned on the way: what is left and what comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import (
    CHUNK,
    NEW,
    PROMPT,
    assert_same,
    bits_of,
    generated,
    logits_of,
    prompt,
)

# -- several calls -------------------------------------------------------------------------------


def test_two_generates_are_one_long_one(dj: djinn.Dj) -> None:
    plain = generated(dj, prompt(PROMPT), 7)
    for first in (1, 3, 6):
        with dj.session() as s:
            parts = [s.generate(prompt(PROMPT), max_new_tokens=first, output_logits=True).result()]
            parts.append(s.generate(max_new_tokens=7 - first, output_logits=True).result())
            assert torch.cat([part.tokens for part in parts]).tolist() == plain.tokens.tolist() == s.tokens.tolist()
            assert_same_bits(torch.cat([bits_of(part) for part in parts]), plain.logits)


def test_generate_goes_on_from_forward(dj: djinn.Dj) -> None:
    plain = generated(dj, prompt(PROMPT), 5)
    for cut in (CHUNK, PROMPT):
        with dj.session() as s:
            logits = logits_of(s, prompt(PROMPT)[:cut])
            rest = prompt(PROMPT)[cut:]
            told: list[int] = []
            options: dict[str, Any] = {"max_new_tokens": 5, "output_logits": True, "on_token": told.append}
            run = s.generate(rest, **options) if len(rest) else s.generate(**options)
            result = run.result()
            # A forward call has all logits, the program of a generate call the last only: its head has other bits.
            first = 1 if cut == PROMPT else 0
            assert_same_bits(bits_of(result)[first:], bits_of(plain)[first:])
            assert not first or same_bits(bits_of(result)[0], logits[-1])
            assert told == plain.tokens[PROMPT:].tolist() and result.tokens.tolist() == [*rest.tolist(), *told]


def test_a_conversation_is_one_long_prompt(one: djinn.Dj) -> None:
    with one.session() as s:
        s.generate(prompt(CHUNK), max_new_tokens=3).result()
        spoken = s.tokens
        logits = logits_of(s, prompt(5, 1))
        assert s.tokens.tolist() == [*spoken.tolist(), *prompt(5, 1).tolist()]
    expected = one(torch.cat([spoken, prompt(5, 1)])).logits[0, -5:]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_what_a_call_said_is_not_what_later_calls_say(one: djinn.Dj) -> None:
    with one.session() as s:
        first = s.generate(prompt(5), max_new_tokens=3)
        said = first.result().tokens.tolist()
        second = s.generate(prompt(2, 1), max_new_tokens=3)
        assert first.tokens.tolist() == first.result().tokens.tolist() == said
        last = second.result().tokens.tolist()
        assert (first.tokens.tolist(), first.generated, second.generated) == (said, 3, 3)
        assert last[:2] == prompt(2, 1).tolist() and s.tokens.tolist() == said + last


def test_one_unfinished_run_at_a_time(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        for _ in range(2):
            acts: list[Callable[[], Run]] = [lambda: s.generate(max_new_tokens=1), lambda: s.forward(prompt(2))]
            for act in acts:
                with pytest.raises(djinn.SessionBusy, match=r"run.result\(\).*iterate it.*run.close\(\)"):
                    act()
            next(run)
        assert_same(run.result(), generated(one, prompt(PROMPT)))


# -- abandoned -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [0, 1, 2, 3, 4])
def test_an_abandoned_run_leaves_what_was_committed(dj: djinn.Dj, stops: int) -> None:
    """The step it stood in is as if it had not been: neither its edit nor its tokens' KV is left."""
    with dj.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, breakpoints=["resid_post.0"])
        for _ in range(stops):
            stop = next(run)
        if stops:
            stop.value.zero_()
        run.close()
        run.close()
        assert (run.finished, run.finish_reason, run.stop) == (True, "closed", None)
        for act in (lambda: next(run), run.result, lambda: run.rewind(0)):
            with pytest.raises(djinn.SessionClosed, match=r"abandoned with close\(\); start another on its session"):
                act()
        plain = generated(dj, prompt(PROMPT), NEW + 2)
        left = (0, 0, CHUNK, PROMPT + 1, PROMPT + 2)[stops]
        assert s.tokens.tolist() == plain.tokens[:left].tolist()
        if not left:
            with pytest.raises(djinn.InvalidValue, match="the prompt is empty"):
                s.generate(max_new_tokens=1)
            assert_same(
                s.generate(prompt(3), max_new_tokens=NEW, output_logits=True).result(), generated(dj, prompt(3))
            )
            return
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
        if left == CHUNK:
            assert_same_bits(more.logits, generated(dj, prompt(PROMPT)[:CHUNK]).logits)
        else:
            assert_same_bits(more.logits, bits_of(plain)[left - PROMPT :][:NEW])


def test_an_abandoned_prompt_is_no_reason_to_use_older_logits(one: djinn.Dj) -> None:
    with one.session() as s:
        logits_of(s, prompt(CHUNK))
        run = s.generate(prompt(PROMPT, 1), max_new_tokens=NEW, breakpoints=["resid_post.0"])
        next(run)
        next(run)
        run.close()
        whole = torch.cat([prompt(CHUNK), prompt(PROMPT, 1)[:CHUNK]])
        assert s.tokens.tolist() == whole.tolist()
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
    assert_same_bits(more.logits, generated(one, whole).logits)


def test_a_rewound_and_abandoned_run(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW)
        run.result()
        run.rewind(17, "resid_post.0").value.zero_()
        run.close()
        more = s.generate(max_new_tokens=NEW, output_logits=True).result()
    assert_same_bits(more.logits, generated(one, prompt(PROMPT)[:CHUNK]).logits)


def test_closing_a_session_abandons_its_run(one: djinn.Dj) -> None:
    s: Session = one.session()
    run = s.generate(prompt(4), max_new_tokens=NEW, breakpoints=["resid_post.0"])
    stop = next(run)
    kept = stop.value.clone()
    s.close()
    s.close()
    assert s.closed and not s.resident and run.finish_reason == "closed" and "closed" in repr(s)
    assert_same_bits(stop.value, kept)
    acts: list[Callable[[], object]] = [lambda: next(run), run.result, lambda: s.forward(prompt(2))]
    acts += [s.offload, s.pin, s.checkpoint, lambda: s.steer("resid_post.0", scale=2.0), lambda: run.rewind(0)]
    for act in acts:
        with pytest.raises(djinn.SessionClosed):
            act()
    with pytest.raises(djinn.SessionClosed):
        stop.value = kept
