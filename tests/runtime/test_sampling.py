"""Sampling: what is drawn from, how often, and that a row's token is its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from djinn_fx.errors import InvalidValue
from djinn_fx.kernels.advance import greedy
from djinn_fx.kernels.philox import uniform
from djinn_fx.runtime.sampling import SamplingSpec, invert, sample, weights

NAN, INF = math.nan, math.inf
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

SPECS = [
    SamplingSpec(do_sample=True),
    SamplingSpec(do_sample=True, temperature=0.7),
    SamplingSpec(do_sample=True, top_k=5),
    SamplingSpec(do_sample=True, top_p=0.83),
    SamplingSpec(do_sample=True, temperature=1.7, top_k=9, top_p=0.61),
]


def draws(logits: Tensor, spec: SamplingSpec, count: int, seed: int = 1) -> Tensor:
    """Many tokens from one row of logits, at the positions 0, 1, 2, ..."""
    positions = torch.arange(count, device=logits.device)
    return sample(logits.expand(count, -1), spec, torch.full_like(positions, seed), positions)


def warped(scores: Tensor, spec: SamplingSpec) -> Tensor:
    """The scores as transformers would hand them to ``multinomial``."""
    warpers: list[Any] = [TemperatureLogitsWarper(spec.temperature)]
    warpers += [TopKLogitsWarper(spec.top_k)] if spec.top_k is not None else []
    warpers += [TopPLogitsWarper(spec.top_p)] if spec.top_p is not None else []
    for warper in warpers:
        scores = warper(torch.empty(0), scores)
    return scores


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_supports_and_shares_are_those_of_transformers(spec: SamplingSpec) -> None:
    for vocabulary in (1, 2, 7, 50, 1003):
        scores = torch.randn(40, vocabulary) * 3
        expected, found = warped(scores, spec), weights(scores, spec)
        assert torch.equal(found > 0, expected > -INF)
        shares = found.double() / found.sum(-1, keepdim=True)
        torch.testing.assert_close(shares, expected.double().softmax(-1), rtol=1e-5, atol=1e-9)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.integers(1, 14),
    st.sampled_from([0.137, 0.31, 0.5003, 0.77, 0.913, 1.0]),
)
def test_ties_are_cut_as_transformers_does(levels: list[int], top_k: int, top_p: float) -> None:
    scores = torch.tensor([levels], dtype=torch.float32)
    for spec in (SamplingSpec(top_k=top_k), SamplingSpec(top_p=top_p), SamplingSpec(top_k=top_k, top_p=top_p)):
        assert torch.equal(weights(scores, spec) > 0, warped(scores, spec) > -INF)


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_sufficient_set(scores: list[float], top_p: float) -> None:
    logits = torch.tensor([scores])
    shares = logits.double().softmax(-1)[0]
    kept = weights(logits, SamplingSpec(top_p=top_p))[0] > 0
    assert shares[kept].sum() >= top_p - 1e-9
    assert shares[kept].sum() - shares[kept].min() <= top_p + 1e-9
    if not kept.all():
        assert logits[0][kept].min() >= logits[0][~kept].max()


def test_exactly_sufficient_mass_is_enough() -> None:
    for count in (10, 1000):
        level = torch.zeros(1, count)
        for kept in range(count // 10, count + 1, count // 10):
            assert int((weights(level, SamplingSpec(top_p=kept / count)) > 0).sum()) == kept
    assert int((weights(torch.zeros(1, 100_000), SamplingSpec(top_p=0.12345)) > 0).sum()) == 12_345


def test_the_likeliest_token_stays_whatever_top_p() -> None:
    assert (weights(torch.tensor([[1.0, 2.0, 0.0]]), SamplingSpec(top_p=1e-30)) > 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_frequencies(spec: SamplingSpec, device: str) -> None:
    logits, count = torch.linspace(-2, 1.5, 14)[torch.randperm(14)].to(device), 5_000
    hits = torch.bincount(draws(logits, spec, count).cpu(), minlength=14)
    expected = warped(logits[None].cpu(), spec).double().softmax(-1)[0] * count
    assert not hits[expected == 0].any()
    kept = expected > 0
    chi_square = ((hits - expected)[kept] ** 2 / expected[kept]).sum().item()
    assert chi_square < 45  # at most 13 degrees of freedom: exceeded once in 40,000


def test_draws_invert_the_cumulative_distribution() -> None:
    logits = torch.randn(1000)
    steps = torch.arange(500)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform(torch.full_like(steps, 3), steps), right=True)
    assert torch.equal(draws(logits, SPECS[0], 500, seed=3), expected)


@given(st.integers(1, 2**62 - 1), st.integers(0, 2**61), st.sampled_from([0.0, 0.25, 1 - 2**-53]))
def test_invert_stays_within_the_total(most: int, rest: int, share: float) -> None:
    found = torch.tensor([[0, most, 0, min(rest, 2**62 - 1 - most), 0]])
    token = int(invert(found, torch.tensor([share], dtype=torch.float64)))
    assert found[0, token] > 0
    if share == 0:
        assert token == 1
    elif share > 0.5 and found[0, 3] > 2**14:
        assert token == 3


def test_seeds_and_positions_draw_anew_and_repeat() -> None:
    logits = torch.zeros(1, 1000)
    first = draws(logits, SPECS[0], 50, seed=1)
    assert torch.equal(first, draws(logits, SPECS[0], 50, seed=1))
    assert (first != draws(logits, SPECS[0], 50, seed=2)).sum() > 40
    assert first.unique().numel() > 40


LOGIT = st.floats(-30, 30, width=16) | st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0])
ROWS = st.lists(st.lists(LOGIT, min_size=11, max_size=11), min_size=1, max_size=6)


@given(ROWS, st.sampled_from([*SPECS, SamplingSpec()]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_does_not_know_its_batch(rows: list[list[float]], spec: SamplingSpec, dtype: torch.dtype) -> None:
    logits = torch.tensor(rows, dtype=dtype)
    seeds, positions = torch.arange(len(rows)) * 7 - 9, torch.arange(len(rows)) * 3
    together = sample(logits, spec, seeds, positions)
    assert together.dtype == torch.int64
    parts = zip(logits.split(1), seeds.split(1), positions.split(1), strict=True)
    apart = [sample(row, spec, seed, position) for row, seed, position in parts]
    assert together.tolist() == torch.cat(apart).tolist()
    assert torch.equal(weights(logits, spec), torch.cat([weights(row, spec) for row in logits.split(1)]))
    assert all(0 <= token < 11 for token in together.tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bits_in_large_batches(spec: SamplingSpec, device: str) -> None:
    logits = (torch.randn(9, 5003) * 4).to(device)
    found = weights(logits, spec)
    assert all(torch.equal(found[index : index + 1], weights(logits[index : index + 1], spec)) for index in range(9))
    assert found.sum(-1).max() < 2**62
    assert weights(torch.zeros(1, 4095, device=device), SPECS[0]).sum() < 2**62


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_greedy(dtype: torch.dtype, device: str) -> None:
    rows = {
        (1, 5, 2, 5): 1,
        (NAN, 3, 3, NAN): 1,
        (NAN, -INF, NAN, -INF): 1,
        (-INF, -INF, -INF, -INF): 0,
        (NAN, NAN, NAN, NAN): 0,
        (2, INF, NAN, INF): 1,
        (-0.0, 0.0, -1, -1): 0,
    }
    logits = torch.tensor(list(rows), dtype=dtype, device=device)
    none = torch.zeros(len(rows), dtype=torch.int64, device=device)
    assert greedy(logits).tolist() == list(rows.values())
    assert sample(logits, SamplingSpec(temperature=0), none, none).tolist() == list(rows.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_that_cannot_be_drawn_from_are_decided_greedily(spec: SamplingSpec, device: str) -> None:
    logits = torch.tensor(
        [[0.0, NAN, 3.0, 2.9], [NAN] * 4, [-INF] * 4, [NAN, -INF, -INF, -INF], [-INF, 1.0, -INF, NAN]],
        device=device,
    ).repeat(20, 1)
    seeds = torch.arange(100, device=device)
    assert sample(logits, spec, seeds, seeds).tolist() == [2, 0, 0, 1, 1] * 20


def test_infinite_logits() -> None:
    logits = torch.tensor([1.0, INF, -INF, INF])
    assert draws(logits, SPECS[0], 200).unique().tolist() == [1, 3]
    assert draws(torch.tensor([-INF, 1.0, 1.0, -INF]), SPECS[3], 200).unique().tolist() == [1, 2]


def test_extreme_temperatures() -> None:
    logits = torch.randn(200)
    cold = draws(logits, SamplingSpec(do_sample=True, temperature=1e-300), 100)
    assert cold.unique().tolist() == [int(logits.argmax())]
    hot = weights(logits[None], SamplingSpec(temperature=1e300))
    assert hot.unique().numel() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*SPECS, SamplingSpec()], ids=str)
def test_never_waits_for_the_device(spec: SamplingSpec) -> None:
    """What waits cannot be captured."""
    logits = torch.randn(3, 50, device="cuda")
    seeds, positions = torch.arange(3, device="cuda"), torch.arange(3, device="cuda")
    eager = sample(logits, spec, seeds, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, spec, seeds, positions)
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.gpu
def test_seeds_may_be_on_the_host() -> None:
    logits = torch.randn(30, 500, device="cuda")
    seeds, positions = torch.arange(30), torch.arange(30) * 5
    there = sample(logits, SPECS[4], seeds.cuda(), positions.cuda())
    assert torch.equal(sample(logits, SPECS[4], seeds, positions), there)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"do_sample": True, "temperature": 0}, "do_sample=False"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=False"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": NAN}, "temperature=nan"),
        ({"temperature": INF}, "temperature=inf"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"temperature": True}, "temperature=True"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": -4}, "top_k=-4"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_k": True}, "top_k=True"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": NAN}, "top_p=nan"),
        ({"top_p": "0.9"}, "top_p='0.9'"),
    ],
)
def test_values_that_mean_nothing_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        SamplingSpec(**given)


def test_values_at_the_border_are_accepted() -> None:
    assert SamplingSpec(do_sample=True, temperature=2, top_k=1, top_p=1).top_p == 1
    assert SamplingSpec(temperature=0).temperature == 0
