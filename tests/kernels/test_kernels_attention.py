"""djinn::attention against its definition, and the promise that a row's bits are its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from djinn_fx.errors import InternalError
from djinn_fx.kernels.attention import QUERY_BLOCK
from tests.kernels.attention_cases import Case, alone, bits, make_case, reference, same_bits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

DECODE = [(4, 5), (0, 1), (0, 0), (36, 37), (16, 17)]
PREFILL = [(0, 9), (5, 12), (0, 0), (30, 31), (3, 14)]

SHAPES: dict[str, dict[str, Any]] = {
    "decode": {"spans": DECODE},
    "prefill": {"spans": PREFILL},
    "more pads": {"spans": PREFILL, "query": 15},
    "decode with pads": {"spans": DECODE, "query": 3},
    "all dead": {"spans": [(0, 0), (0, 0)], "query": 2},
    "no groups": {"spans": PREFILL, "heads": 3, "groups": 3},
    "one key-value head": {"spans": DECODE, "heads": 6, "groups": 1},
    "odd widths": {"spans": PREFILL, "heads": 6, "groups": 3, "depth": 7, "value_depth": 5},
    "odd decode": {"spans": DECODE, "heads": 3, "groups": 3, "depth": 9, "value_depth": 20},
    "several blocks": {"spans": [(7, 2 * QUERY_BLOCK + 20), (0, QUERY_BLOCK)], "heads": 2, "depth": 8},
}

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "wide window": {"window": 1000},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 6, "softcap": 2.0, "sinks": True},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, extra: str, device: str) -> None:
    case = make_case(**SHAPES[shape], **EXTRAS[extra]).to(device)
    out = case.run()
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    torch.testing.assert_close(out.cpu().double(), reference(case), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_fp64_is_computed_in_fp64(device: str) -> None:
    case = make_case(PREFILL, dtype=torch.float64, window=5, softcap=1.5, sinks=True).to(device)
    torch.testing.assert_close(case.run().cpu(), reference(case), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spans", [DECODE, PREFILL])
def test_narrow_types_round_once(spans: list[tuple[int, int]], dtype: torch.dtype, device: str) -> None:
    case = make_case(spans, dtype=dtype, softcap=3.0, sinks=True).to(device)
    found, wanted = case.run(), case.to(device, torch.float32).run().to(dtype)
    if device == "cpu":
        assert same_bits(found, wanted)
    else:  # sums of fp32 in another order: where they lie between two numbers, the other may be taken
        apart = bits(found).int() - bits(wanted).int()
        assert apart.abs().max() <= 1
        assert apart.count_nonzero() <= 0.01 * apart.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_pads_and_dead_rows_are_positive_zeros(device: str) -> None:
    case = make_case([(0, 3), (0, 0)], query=5).to(device)
    out = case.run()
    assert not out[0, :3].eq(0).any()
    assert same_bits(out[0, 3:], torch.zeros_like(out[0, 3:]))
    assert same_bits(out[1], torch.zeros_like(out[1]))


@st.composite
def steps(draw: st.DrawFn, *, on_gpu: bool = False) -> tuple[Case, list[dict[str, int]]]:
    """A step, and for each of its rows another place where to meet it.

    A GPU compiles a kernel for each size of heads, so there are fewer, and another one for steps of
    one token, so these stay such.
    """
    decode = draw(st.booleans())
    spans = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 70))
        spans.append((length - 1 if decode else draw(st.integers(0, length - 1)), length))
    groups, grouped = draw(st.integers(1, 3)), 2 if on_gpu else draw(st.sampled_from([1, 1, 2, 4]))
    dtypes = (
        [torch.float32, torch.bfloat16] if on_gpu else [torch.float32, torch.float32, torch.bfloat16, torch.float64]
    )
    case = make_case(
        spans,
        heads=groups * grouped,
        groups=groups,
        depth=draw(st.sampled_from([16, 33] if on_gpu else [7, 8, 16, 33, 64])),
        value_depth=None if on_gpu else draw(st.sampled_from([None, 16, 5])),
        dtype=draw(st.sampled_from(dtypes)),
        window=draw(st.sampled_from([None, None, 3, 20])),
        softcap=None if on_gpu else draw(st.sampled_from([None, 2.0])),
        sinks=on_gpu or draw(st.booleans()),
        arena_positions=draw(st.integers(70, 90)),
        seed=draw(st.integers(0, 50)),
    )
    places = []
    for first, length in spans:
        arena_rows = draw(st.integers(1, 5))
        place = {"arena_rows": arena_rows, "row": draw(st.integers(0, arena_rows - 1))}
        place["arena_positions"] = draw(st.integers(length, 100))
        least = max(length - first, min(case.q.shape[2], 2)) if on_gpu else length - first
        place["query"] = 1 if on_gpu and case.q.shape[2] == 1 else draw(st.integers(least, least + 3))
        places.append(place)
    return case, places


def check_rows_are_their_own(case: Case, places: list[dict[str, int]]) -> None:
    out = case.run()
    for index, place in enumerate(places):
        count = int(case.lengths[index] - case.positions[index, 0])
        by_itself = alone(case, index, **place).run()
        assert same_bits(by_itself[0, :count], out[index, :count]), (index, place)


@given(steps())
@settings(max_examples=120)
def test_bits_of_a_row_are_its_own(step: tuple[Case, list[dict[str, int]]]) -> None:
    check_rows_are_their_own(*step)


@pytest.mark.gpu
@given(steps(on_gpu=True))
@settings(max_examples=60)
def test_bits_of_a_row_are_its_own_on_a_gpu(step: tuple[Case, list[dict[str, int]]]) -> None:
    check_rows_are_their_own(step[0].to("cuda"), step[1])


@pytest.mark.parametrize("device", DEVICES)
def test_permuting_the_batch_permutes_the_result(device: str) -> None:
    case = make_case([*PREFILL, (9, 10), (0, 11)], depth=9, window=7).to(device)
    order = torch.randperm(len(case.rows)).to(device)
    moved = {name: getattr(case, name)[order] for name in ("q", "rows", "positions", "lengths")}
    assert same_bits(replace(case, **moved).run(), case.run()[order])


@pytest.mark.parametrize("device", DEVICES)
def test_layout_and_address_of_the_arguments_do_not_matter(device: str) -> None:
    case = make_case(PREFILL, depth=16).to(device)
    out = case.run()
    assert not case.q.is_contiguous()
    assert same_bits(replace(case, q=case.q.contiguous()).run(), out)
    for shift in (1, 16):  # an arena that starts in the middle of another tensor

        def shifted(arena: torch.Tensor, shift: int = shift) -> torch.Tensor:
            slab = arena.new_empty(arena.numel() + shift)
            return slab[shift:].view(arena.shape).copy_(arena)

        elsewhere = replace(case, k_arena=shifted(case.k_arena), v_arena=shifted(case.v_arena))
        assert same_bits(elsewhere.run(), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("wild", [float("inf"), float("-inf"), float("nan")])
def test_a_wild_value_reaches_only_the_queries_that_see_it(wild: float, window: int | None, device: str) -> None:
    case = make_case([(2, 12), (0, 8)], window=window).to(device)
    calm = case.run()
    row = int(case.rows[0])
    case.v_arena[row, 1, 6, 2] = wild
    case.v_arena[row, 0, 9, 3] = -wild
    case.k_arena[row, 1, 10, 0] = wild
    out = case.run()
    torch.testing.assert_close(out.cpu().double(), reference(case), rtol=2e-5, atol=2e-6, equal_nan=True)
    assert torch.equal(out[0, :4], calm[0, :4])  # positions 2 to 5
    assert same_bits(out[1], calm[1])
    assert not out[0, 4].isfinite().all()


def test_a_length_beyond_the_arena_is_our_bug() -> None:
    case = make_case([(4, 5)], arena_positions=5)
    with pytest.raises(InternalError, match="batch row 0 has 6 of 5"):
        replace(case, lengths=case.lengths + 1).run()


def test_threads_and_grad_mode_do_not_matter() -> None:
    cases = [make_case(PREFILL, seed=seed, softcap=2.0) for seed in range(4)]
    expected = [case.run() for case in cases]

    def run(case: Case) -> torch.Tensor:
        with torch.no_grad():
            return case.run()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, cases))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
