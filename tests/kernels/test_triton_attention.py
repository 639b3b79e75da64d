"""The Triton attention kernels on a GPU: against the torch twin, and the promises about bits and graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from djinn_fx.kernels import attention as twin
from djinn_fx.kernels import triton_attention
from tests.kernels.attention_cases import NAN, Case, alone, make_case, on_poison, permuted, same_bits

DECODE = [(4, 5), (0, 1), (0, 0), (69, 70), (16, 17)]
PREFILL = [(0, 9), (5, 42), (0, 0), (30, 31), (3, 14)]

EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "all": {"window": 50, "softcap": 2.0, "sinks": True},
}

#: Key and value widths: those of models (gpt2, phi-2, phi-1, h2o-danube, llama, deepseek, gemma) and an odd one.
WIDTHS = [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256), (36, 68)]


def near_twin(case: Case) -> None:
    """The kernels give what the twin gives from the same numbers, rounded once."""
    found = on_poison(triton_attention.attention, case)
    wide = twin.attention(*case.to("cuda", torch.float32).args())  # type: ignore[arg-type]
    slack = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}[found.dtype]
    torch.testing.assert_close(found.float(), wide, rtol=slack, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [[(900, 901), (0, 1), (0, 0), (511, 512)], [(0, 130), (300, 371), (0, 0), (4, 5)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("depth", "value_depth"), WIDTHS)
def test_every_width(depth: int, value_depth: int, dtype: torch.dtype, spans: list[tuple[int, int]]) -> None:
    near_twin(make_case(spans, heads=6, depth=depth, value_depth=value_depth, dtype=dtype).to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [[(900, 901), (0, 1), (0, 0), (77, 78)], [(0, 70), (300, 371), (0, 0), (4, 5)]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 7, 24, 71])
def test_every_option(heads: int, dtype: torch.dtype, spans: list[tuple[int, int]]) -> None:
    groups = 2 if heads % 2 == 0 else 1
    for extra in EXTRAS.values():
        near_twin(make_case(spans, heads=heads, groups=groups, depth=32, dtype=dtype, **extra).to("cuda"))


@pytest.mark.gpu
def test_fp64_is_the_twins() -> None:
    case = make_case(DECODE, dtype=torch.float64, sinks=True).to("cuda")
    assert same_bits(triton_attention.attention(*case.args()), twin.attention(*case.args()))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("depth", [64, 80, 128])
@pytest.mark.parametrize("decode", [True, False])
def test_bits_of_a_row_in_large_batches_and_other_arenas(decode: bool, depth: int, dtype: torch.dtype) -> None:
    lengths = [1, 63, 64, 65, 127, 128, 129, 300, 511, 512, 513, 700, 1000, 1023, 1024, 1025]
    spans = [(length - 1 if decode else max(0, length - 80), length) for length in lengths * 2]
    case = make_case(spans, depth=depth, dtype=dtype, window=None).to("cuda")
    out = case.run()
    order = torch.randperm(len(spans)).cuda()
    assert same_bits(permuted(case, order).run(), out[order])
    for index in (0, 2, 3, 9, 15, 20, 31):
        count = spans[index][1] - spans[index][0]
        for positions in (1025, 1031, 2047):
            width = 1 if decode else max(2, count)
            one = alone(case, index, arena_rows=3, arena_positions=positions, row=1, query=width)
            assert same_bits(one.run()[0, :count], out[index, :count]), (index, positions)


@pytest.mark.gpu
@pytest.mark.parametrize("query", [1, 20])
def test_other_strides(query: int) -> None:
    case = make_case([(9, 10), (0, query), (0, 0)], query=query, depth=16).to("cuda")
    out = case.run()
    k_arena, v_arena = (a.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1) for a in (case.k_arena, case.v_arena))
    assert not k_arena.is_contiguous()
    rows, positions, lengths = (torch.stack((t,) * 3, -1)[..., 1] for t in (case.rows, case.positions, case.lengths))
    moved = Case(case.q.mT.contiguous().mT, k_arena, v_arena, rows, positions, lengths, scale=case.scale)
    assert same_bits(moved.run(), out)


@pytest.mark.gpu
@pytest.mark.parametrize("query", [1, 20])
def test_offsets_beyond_31_bits(query: int) -> None:
    """A row of the arena that starts more than 2**31 elements behind its beginning."""
    case = make_case([(299, 300), (0, query)], query=query, heads=16, groups=8, depth=128, dtype=torch.bfloat16).to(
        "cuda"
    )
    last = 2**31 // (8 * 1025 * 128) + 2
    arenas = []
    for arena in (case.k_arena, case.v_arena):
        large = torch.full((last + 2, 8, 1025, 128), NAN, dtype=torch.bfloat16, device="cuda")
        assert large[last].data_ptr() - large.data_ptr() > 2 * 2**31
        for row, old in zip((last, 0), case.rows.tolist(), strict=True):
            large[row, :, :300] = arena[old, :, :300]
        arenas.append(large)
    far = replace(case, k_arena=arenas[0], v_arena=arenas[1], rows=case.rows.new_tensor([last, 0]))
    assert same_bits(far.run(), case.run())


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [DECODE, PREFILL])
@pytest.mark.parametrize("window", [None, 20])
def test_graphs_are_captured_and_follow_their_inputs(window: int | None, spans: list[tuple[int, int]]) -> None:
    case = make_case(spans, window=window, sinks=True, dtype=torch.bfloat16).to("cuda")
    case.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    order = torch.tensor([3, 0, 4, 1, 2], device="cuda")
    for name, moved in vars(permuted(case, order)).items():
        if name in ("q", "rows", "positions", "lengths"):
            getattr(case, name).copy_(moved)
    out.fill_(NAN)
    graph.replay()
    assert same_bits(out, case.run())
    case.lengths.zero_()  # every row dies
    graph.replay()
    assert not out.any()
