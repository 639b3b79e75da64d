"""A session as it stands, looked at without a change: its logits, sites, first NaN; two of them side by side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from tests.runtime.tiny import CHUNK, NEW, PROMPT, another_dj, bits_of, direction, prompt, some

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-4}  # fp32: positions are computed alone here, in batches there


@pytest.mark.parametrize("backend", ["eager", "static"])
def test_the_logits_of_an_edited_session_are_its_own(backend: str) -> None:
    dj = another_dj("llama", backend=backend)
    with dj, dj.session() as s:
        once = djinn.break_at("resid_post.0", positions=PROMPT + 1)
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[once])
        s.steer("resid_post.1", add=direction(1), positions="generated")
        stop = next(run)
        stop.value.mul_(-2.0)
        seen = dj.run_with_cache(s, ["resid_post.0", "mlp_out.0"], positions=stop.position)[1]
        assert torch.equal(seen["resid_post.0"][0], stop.value)
        s.steer("attn_q.0", ablate=direction(2))
        before = s.tokens.tolist()
        ahead = dj(s).logits[0, -1]
        torch.testing.assert_close(dj(stop).logits[0, -1], ahead, **CLOSE)
        again = dj.run_with_cache(stop, ["resid_post.0", "mlp_out.0"], logits=False)[1]
        assert torch.equal(again["resid_post.0"][0], stop.value)
        torch.testing.assert_close(again["mlp_out.0"][0], seen["mlp_out.0"][0], **CLOSE)
        assert s.tokens.tolist() == before and run.stop is stop
        kept = bits_of(run.result())
        torch.testing.assert_close(ahead, kept[2], **CLOSE)
        torch.testing.assert_close(dj(s).logits[0, PROMPT - 1 : -1], kept, **CLOSE)
        plain = dj(s.tokens).logits[0, PROMPT - 1 : -1]
        assert (plain - kept).abs().max() > 0.01


def test_a_session_in_the_middle_of_its_prompt(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=2, output_logits=True, breakpoints=["resid_post.0"])
        stop = next(run)  # the first of two chunks
        assert stop.position == CHUNK - 1
        stop.value[3] = 0
        ahead = one(s).logits[0]
        assert ahead.shape[0] == PROMPT
        step = one(stop).logits[0]
        torch.testing.assert_close(step, ahead[:CHUNK], **CLOSE)
        second = next(run)
        s.offload()
        torch.testing.assert_close(one(second).logits[0], ahead[CHUNK:], **CLOSE)
        torch.testing.assert_close(ahead[-1], bits_of(run.result())[0], **CLOSE)
        with pytest.raises(djinn.StaleStop):
            one(stop)


def test_a_full_session_and_one_with_several_calls(one: djinn.Dj) -> None:
    with one.session() as s:
        s.generate(prompt(5), max_new_tokens=2).run_to_end()
        s.steer("resid_post.0", scale=0.5)
        length = one.engine.options.max_length
        kept = bits_of(s.generate(prompt(5, 1), max_new_tokens=length, output_logits=True).result())
        assert len(s.tokens) == length + 1  # the last token has no place any more
        logits = one(s).logits[0]
        assert len(logits) == length
        torch.testing.assert_close(logits[-len(kept) :], kept, **CLOSE)


def test_the_first_nan_is_the_sessions_own(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, breakpoints=["resid_post.0"])
        next(run)
        assert one.first_nonfinite(s) is None
        some(run.stop).value[-1, 3] = float("nan")
        assert one.first_nonfinite(s) == ("resid_post.0", (CHUNK - 1,))
        next(run)
        assert one.first_nonfinite(s, "resid_post.1") is not None
        assert one.first_nonfinite(s.tokens) is None


def test_diff_sees_edits_where_the_tokens_are_the_same(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(6), max_new_tokens=NEW, breakpoints=["resid_post.0"])
        stop = next(run)
        (other,) = stop.fork()
        assert all(place.kl == 0 for place in djinn.diff(run, other.run, dj=one).places)
        other.value[-1] *= 0.5
        found = djinn.diff(run, other.run, dj=one)
        assert found.first_difference is None
        gaps = [place.kl or 0.0 for place in found.places]
        assert gaps[:-1] == [0.0] * 5 and gaps[-1] > 0
        other.value[-1, 0] = float("inf")
        gap = djinn.diff(run, other.run, dj=one).places[-1].kl
        assert gap is not None and math.isnan(gap)
        assert "nan" in str(djinn.diff(run, other.run, dj=one)).splitlines()[-1]


def test_diff_takes_the_logits_that_a_run_kept(one: djinn.Dj) -> None:
    with one.session() as a, one.session() as b:
        kept = a.forward(prompt(6))
        kept.run_to_end()
        fresh = b.generate(prompt(6), max_new_tokens=1, output_logits=True)
        fresh.run_to_end()
        next(iter(kept.records)).logits = torch.zeros(6, one.engine.options.vocab_size)
        places = djinn.diff(kept, fresh, dj=one).places
        assert [place.best[0] for place in places[:6]] == [0] * 6
        assert all(place.kl is not None and place.kl > 0.1 for place in places[:6])


def test_what_cannot_be_looked_at_is_refused(one: djinn.Dj) -> None:
    other = another_dj("gpt2")
    with one.session() as s:
        with pytest.raises(djinn.InvalidValue, match="no tokens yet"):
            one(s)
        s.generate(prompt(3), max_new_tokens=1).run_to_end()
        with pytest.raises(djinn.InvalidValue, match="another compiled model"):
            other(s)
        with pytest.raises(djinn.InvalidValue, match="another compiled model"):
            other(s.run.rewind(position=1) if s.run else None)
        with pytest.raises(djinn.InvalidValue, match="run_with_hooks takes prompts"):
            one.run_with_hooks(s, [("resid_post.0", lambda value, hook: value)])
    with pytest.raises(djinn.SessionClosed):
        one(s)
    other.close()
