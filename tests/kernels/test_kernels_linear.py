"""Linear layers of one input: the torch twin, the operator, and how the kernels are cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from djinn_fx.errors import InternalError
from djinn_fx.kernels import ops
from djinn_fx.kernels.linear import BUCKETS, Tiles, bucket, kernel_choices, linears, plan
from tests.bits import assert_same_bits
from tests.kernels.linear_cases import check_close, make_call
from tests.kernels.residual_cases import LEVELS, check_levels

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OP = torch.ops.djinn.linears


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twin_is_torch(dtype: torch.dtype) -> None:
    call = make_call(5, 64, [32, 48, 7], transposed=[False, True, False], biased=[True, True, False], dtype=dtype)
    x, weights, biases, _ = call
    found = linears(*call)
    check_close(call, found, units=1.0)
    assert_same_bits(found[0], F.linear(x, weights[0], biases[0]))
    assert biases[1] is not None
    assert_same_bits(found[1], torch.addmm(biases[1], x.view(5, 64), weights[1]).view(5, 1, 48))
    assert_same_bits(found[2], F.linear(x, weights[2]))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (100, 64), (0, 64)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    _, *rest = make_call(1, 64, [32, 16], transposed=[True, False], biased=[False, True], dtype=torch.float32)
    for out, width in zip(OP(torch.randn(shape), *rest), (32, 16), strict=True):
        assert out.shape == (*shape[:-1], width)
        assert out.is_contiguous()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [[False] * 3, [True, False, True]])
def test_schema_and_fake_agree_with_what_the_operator_does(transposed: list[bool], biased: bool) -> None:
    call = make_call(3, 32, [16, 8, 24], transposed=transposed, biased=[biased, False, biased], dtype=torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OP.default, call, test_utils=tests)


def test_fake_refuses_what_does_not_fit() -> None:
    x, weights, biases, layouts = make_call(3, 32, [16], biased=True, device="meta")
    with pytest.raises(InternalError, match="does not fit the weight"):
        OP(x, weights, biases, [True])
    with pytest.raises(InternalError, match="does not fit the weight"):
        OP(x.float(), weights, biases, layouts)
    with pytest.raises(InternalError, match="does not fit the weight"):
        OP(x, weights, [x.new_empty(15)], layouts)


class Layers(nn.Module):
    """What the compiler sees: results that are used apart, one not at all."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        one, two, _ = OP(x * 2, [q, k, v], [bias, None, None], [False, False, True])
        return one.relu() + 1, two.view(-1) * 2


def layers_args() -> tuple[Tensor, ...]:
    return torch.randn(3, 1, 32), torch.randn(16, 32), torch.randn(8, 32), torch.randn(32, 24), torch.randn(16)


@torch.no_grad()
def test_export_and_inductor_keep_it() -> None:
    args = layers_args()
    wanted = Layers()(*args)
    program = torch.export.export(Layers(), args, strict=False)
    assert [node.target for node in program.graph.nodes if "linears" in str(node.target)] == [OP.default]
    artifact: Any = torch.compile(program.module(), backend="inductor", fullgraph=True)
    for module in (program.module(), artifact):
        for found, expected in zip(module(*args), wanted, strict=True):
            assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_joined_with_a_residual(dtype: torch.dtype, transposed: bool) -> None:
    joined = torch.ops.djinn.linear_residual
    assert len(list(check_levels(joined, OP, 3, 24, 16, transposed=transposed, dtype=dtype))) == len(LEVELS)


def test_a_residual_that_does_not_fit_is_named() -> None:
    x, weights, _, _ = make_call(2, 16, [24], dtype=torch.float32)
    for residual in (torch.ones(2, 1, 16), torch.ones(3, 1, 24), torch.ones(2, 1, 24, dtype=torch.float64)):
        with pytest.raises(InternalError, match="does not fit the residual"):
            torch.ops.djinn.linear_residual(
                x.to("meta"), weights[0].to("meta"), None, False, residual.to("meta"), *[None] * 5, []
            )


def test_cuda_goes_to_the_kernels_unless_told_otherwise() -> None:
    def answers(triton: bool) -> Any:
        return next(o for o in ops.operators(triton=triton) if o.name == "linears").backends["cuda"]

    assert answers(False) is linears
    assert answers(True).__module__.endswith("triton_linear")


SIZES = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256), (768, 2304), (768, 768)]
SIZES += [(768, 3072), (3072, 768), (1600, 6400), (2048, 512), (64, 16), (8192, 57344), (28672, 8192)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("depth", "width"), SIZES)
def test_every_cut_is_one_that_the_kernels_can_take(depth: int, width: int, transposed: bool) -> None:
    for rows in range(1, 65):
        cut = plan(rows, depth, (width,), transposed, torch.bfloat16)
        assert cut is not None
        assert cut == plan(bucket(rows), depth, (width,), transposed, torch.float16)
        assert cut.rows in BUCKETS
        assert cut.rows >= rows
        for size in (cut.columns, cut.depth, cut.warps):
            assert size & (size - 1) == 0
        if cut.rows > 1:
            assert cut.depth >= 16
            # Hopper's shared memory.
            assert 2 * (cut.columns + cut.rows) * cut.depth * cut.stages <= 220 * 1024
        assert 1 <= cut.splits <= 8


def test_what_the_kernels_do_not_take() -> None:
    half = torch.bfloat16
    assert plan(0, 64, (64,), False, half) is None
    assert plan(65, 64, (64,), False, half) is None
    assert plan(1, 60, (64,), False, half) is None
    assert plan(1, 64, (60,), True, half) is None
    assert plan(1, 64, (50257,), False, half) is not None
    assert plan(1, 64, (8,), False, half) is None
    assert plan(1, 64, (64,) * 5, False, half) is None
    assert plan(1, 2**16, (2**15,), True, half) is None
    assert plan(1, 64, (64,), False, torch.float32) is None


def test_choices_say_what_decides_bits() -> None:
    half = torch.bfloat16
    one, two, three = kernel_choices(7, 4096, (4096, 1024, 1024), (False,) * 3, half)
    assert one == two == three == str(plan(16, 4096, (6144,), False, half))
    assert kernel_choices(7, 4096, (4096, 1024), (False, True), half) == (
        str(plan(16, 4096, (4096,), False, half)),
        str(plan(16, 4096, (1024,), True, half)),
    )
    assert kernel_choices(7, 4096, (4096,), (False,), torch.float32) == ("torch",)
    seen = {kernel_choices(rows, 4096, (6144,), (False,), half) for rows in range(1, 65)}
    assert len(seen) == len(BUCKETS)


def test_tiles_are_values() -> None:
    for rows, depth in product(BUCKETS, (512, 4096)):
        cut = plan(rows, depth, (1024,), False, torch.bfloat16)
        assert isinstance(cut, Tiles)
        assert replace(cut) == cut
