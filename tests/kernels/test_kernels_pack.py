"""Packing: any tensors go into one buffer and come back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from djinn_fx.errors import InternalError
from djinn_fx.kernels.pack import ALIGNMENT, pack, plan, unpack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bit pattern, NaN with payloads among them; a bool is 0 or 1."""
    high = 2 if dtype == torch.bool else 256
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(high, (count,), dtype=torch.uint8).view(dtype).view(shape)


def raw(tensor: Tensor) -> Tensor:
    """The row-major bytes of a tensor."""
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same values in other strides."""
    if how == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if how == "gaps" and tensor.dim():
        wide = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), dtype=tensor.dtype)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    return tensor


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[Tensor]:
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    hows = st.sampled_from(["contiguous", "transposed", "gaps"])
    return [
        strided(random_bits(draw(shapes), draw(st.sampled_from(DTYPES))), draw(hows))
        for _ in range(draw(st.integers(0, 6)))
    ]


def check_round_trip(tensors: list[Tensor], device: str = "cpu") -> None:
    layout = plan(tensors)
    moved = [tensor.to(device) for tensor in tensors]
    buffer = torch.full((layout.nbytes + 48,), 0xFF, dtype=torch.uint8, device=device)
    pack(moved, buffer)
    expected = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for offset, tensor in zip(layout.offsets, tensors, strict=True):
        assert offset % ALIGNMENT == 0
        expected[offset : offset + raw(tensor).numel()] = raw(tensor)
    assert torch.equal(buffer[: layout.nbytes].cpu(), expected)
    assert buffer[layout.nbytes :].eq(0xFF).all()
    targets = [torch.empty_like(tensor) for tensor in moved]
    unpack(buffer, targets)
    for tensor, target in zip(tensors, targets, strict=True):
        assert torch.equal(raw(target.cpu()), raw(tensor))


@given(tensor_lists())
def test_round_trip(tensors: list[Tensor]) -> None:
    check_round_trip(tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", ["contiguous", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype, how: str, device: str) -> None:
    tensors = [random_bits(shape, dtype) for shape in [(3, 5), (), (0, 4), (7,), (2, 1, 3)]]
    check_round_trip([strided(tensor, how) for tensor in tensors], device)


@pytest.mark.parametrize("device", DEVICES)
def test_unpack_into_a_part_of_an_arena(device: str) -> None:
    """The prefix of a row goes out and comes back into another row; nothing around it changes."""
    arena = torch.randn(4, 2, 9, 3, device=device, dtype=torch.float32).bfloat16()
    tap = torch.randn(2, 5, device=device)
    source = [arena[1, :, :6], tap[1]]
    buffer = torch.empty(plan(source).nbytes, dtype=torch.uint8, device=device)
    pack(source, buffer)
    target, other = torch.zeros_like(arena), torch.zeros_like(tap)
    unpack(buffer, [target[2, :, :6], other[0]])
    assert torch.equal(target[2, :, :6], arena[1, :, :6])
    assert torch.equal(other[0], tap[1])
    target[2, :, :6] = 0
    assert not target.any()
    assert not other[1].any()


def test_plan_of_nothing() -> None:
    assert plan([]) == plan([torch.empty(0, 3)][:0])
    assert plan([torch.empty(0), torch.empty(17, dtype=torch.int8), torch.empty(1)]).offsets == (0, 0, 32)
    assert plan([torch.empty(1)]).nbytes == ALIGNMENT
    pack([], torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(15, dtype=torch.uint8),
        torch.empty(32, dtype=torch.int8),
        torch.empty(1, 32, dtype=torch.uint8),
        torch.empty(64, dtype=torch.uint8)[::2],
        torch.empty(33, dtype=torch.uint8)[1:],
        torch.empty(32, dtype=torch.uint8, device="meta"),
    ],
    ids=["short", "signed", "two axes", "strided", "not aligned", "elsewhere"],
)
def test_a_buffer_that_does_not_fit_is_our_bug(buffer: Tensor) -> None:
    with pytest.raises(InternalError, match="pack: "):
        pack([torch.ones(4)], buffer)
    with pytest.raises(InternalError, match="pack: "):
        unpack(buffer, [torch.ones(4)])
