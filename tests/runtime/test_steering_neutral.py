"""Neutral edits change no bit, -0.0, Inf and NaN included; nor do the edits of a neighbour."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from tests.bits import assert_same_bits, bits
from tests.runtime.tiny import TWO, WIDTH, assert_same, direction, prompt

V = direction(1)
FEATURE = djinn.Feature(V, V, set=1.0)
NEUTRAL: dict[str, dict[str, Any]] = {
    "scale": {"scale": 1.0},
    "scale by ones": {"scale": torch.ones(WIDTH)},
    "add zeros": {"add": torch.zeros(WIDTH)},
    "strength 0": {"scale": 0.3, "add": V, "ablate": V, "feature": FEATURE, "strength": 0.0},
    "elsewhere": {"scale": 0.3, "add": V, "positions": 0},
    "ablation elsewhere": {"ablate": V, "feature": FEATURE, "positions": 0},
}


def plant(value: torch.Tensor) -> None:
    """Numbers that careless arithmetic changes, in every row but the first."""
    for row in value[1:] if len(value) > 1 else value:
        row[:4] = torch.tensor([-0.0, torch.inf, torch.nan, -torch.inf])
        row[6:9] = -0.0


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_edits_change_no_bit(dj: djinn.Dj, name: str) -> None:
    def run(**edit: Any) -> tuple[Result, list[torch.Tensor]]:
        with dj.session() as s:
            if edit:
                s.steer("resid_post.1", **edit)
            run = s.generate(
                prompt(6), max_new_tokens=3, output_logits=True, breakpoints=["resid_post.0", "resid_post.1"]
            )
            seen = []
            for stop in run:
                if stop.site == "resid_post.0":
                    plant(stop.value)
                seen.append(stop.value.clone())
            return run.result(), seen

    plain, values = run()
    assert any(bool((bits(value) == bits(torch.tensor(-0.0, dtype=value.dtype))).any()) for value in values)
    kept, others = run(**NEUTRAL[name])
    assert plain.tokens.tolist() == kept.tokens.tolist()
    for value, other in zip(values, others, strict=True):
        # At position 0 the edits that speak of it act; the stream is planted behind it.
        start = 1 if "elsewhere" in name and len(value) > 1 else 0
        assert_same_bits(value[start:], other[start:])
    assert_same_bits(plain.logits, kept.logits)


@TWO
def test_a_neighbour_in_the_batch_does_not_feel_an_edit(dj: djinn.Dj) -> None:
    def neighbour(*edits: djinn.Edit) -> Result:
        with dj.session() as a, dj.session() as b:
            for edit in edits:
                a.steer(edit)
            runs = [s.generate(prompt(6, i), max_new_tokens=4, output_logits=True) for i, s in enumerate((a, b))]
            return dj.results(runs)[1]

    plain, wild = neighbour(), torch.full((WIDTH,), 3e38)  # makes infinities, and NaN of them
    assert_same(neighbour(djinn.Edit("resid_post.0", scale=wild, positions="generated")), plain)
    assert_same(neighbour(djinn.Edit("resid_post.0", ablate=V), djinn.Edit("resid_post.1", add=V * 1e30)), plain)
