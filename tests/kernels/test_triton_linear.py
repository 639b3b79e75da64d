"""Linear layers by the kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from djinn_fx.kernels.linear import BUCKETS, bucket
from djinn_fx.kernels.triton_linear import linear_residual, linears
from tests.bits import assert_same_bits
from tests.kernels.linear_cases import check_close, make_call
from tests.kernels.residual_cases import LEVELS, check_levels

LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 31, 33, 64])
@pytest.mark.parametrize(
    ("depth", "widths"),
    [(4096, [4096, 1024, 1024]), (4096, [8192, 8192]), (14336, [4096]), (768, [768]), (3072, [768]), (72, [40, 16])],
)
def test_every_size(depth: int, widths: list[int], rows: int, dtype: torch.dtype, transposed: bool) -> None:
    flags = [index % 2 == 0 for index in range(len(widths))]
    call = make_call(rows, depth, widths, transposed=transposed, biased=flags, dtype=dtype, device="cuda")
    check_close(call, linears(*call), units=0.55)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_a_head_of_odd_width(rows: int) -> None:
    call = make_call(rows, 768, [50257], device="cuda")
    check_close(call, linears(*call), units=0.55)


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("size", BUCKETS[1:])
def test_rows_do_not_see_each_other(size: int, transposed: bool) -> None:
    x, weights, biases, layouts = make_call(
        size, 768, [768, 256], transposed=transposed, biased=True, device="cuda"
    )  # fmt: skip
    wanted = linears(x, weights, biases, layouts)
    order = torch.randperm(size, device="cuda")
    count = next(rows for rows in range(2, size + 1) if bucket(rows) == size)
    others = x[order].clone()
    others[count - 1 :] = float("nan")
    few = linears(x[order][:count].contiguous(), weights, biases, layouts)
    for part, found, less in zip(wanted, linears(others, weights, biases, layouts), few, strict=True):
        assert_same_bits(found[: count - 1], part[order][: count - 1])
        assert_same_bits(less, part[order][:count])


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_calls_and_alignments_agree(rows: int, transposed: bool) -> None:
    x, weights, biases, layouts = call = make_call(
        rows, 768, [3072, 768], transposed=transposed, biased=True, device="cuda"
    )  # fmt: skip
    wanted = linears(*call)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    spread = torch.stack((x, x), -1)[..., 0]
    for other in (x, shifted, spread):
        for found, part in zip(linears(other, weights, biases, layouts), wanted, strict=True):
            assert_same_bits(found, part)


@pytest.mark.gpu
def test_within_a_cuda_graph_behind_a_kernel_that_writes_the_input() -> None:
    x, weights, biases, layouts = make_call(4, 4096, [4096, 1024], device="cuda")
    source = torch.randn_like(x)
    linears(x, weights, biases, layouts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(8):
            x.copy_(source).mul_(0.5)
            outs = linears(x, weights, biases, layouts)
    for _ in range(20):
        source.normal_()
        graph.replay()
        for found, wanted in zip(outs, linears(source * 0.5, weights, biases, layouts), strict=True):
            assert_same_bits(found, wanted)


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 32, 64])
@pytest.mark.parametrize(("depth", "width"), [(14336, 4096), (4096, 4096), (3072, 768), (768, 768), (72, 40)])
def test_joined_with_a_residual(depth: int, width: int, rows: int, dtype: torch.dtype, transposed: bool) -> None:
    """A layer, its residual and its edits in one kernel have the bits of the single ops."""
    options = {"transposed": transposed, "dtype": dtype, "device": "cuda"}
    assert len(list(check_levels(linear_residual, linears, rows, depth, width, **options))) == len(LEVELS)
