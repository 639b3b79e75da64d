"""Arenas and what must become of them, for the tests of rows, interpreted and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from djinn_fx.kernels import triton_rows
from djinn_fx.kernels.rows import Piece, Rows

#: Heads, dim of each arena: keys and values alike, narrower values, layers of their own width.
SHAPES = {
    "alike": [(2, 16)] * 4,
    "mixed": [(2, 16), (2, 8), (4, 32), (1, 24)],
    "odd": [(3, 5), (2, 7)],  # no multiple of 16 bytes: the twin moves them
}


def arenas(kind: str, positions: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three rows each, every bit random."""
    made = []
    for heads, dim in SHAPES[kind]:
        bits = torch.randint(256, (3, heads, positions, dim * dtype.itemsize), dtype=torch.uint8)
        made.append(bits.view(dtype).to(device))
    return made


def raw(tensor: Tensor) -> Tensor:
    """The row-major bytes, on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).cpu()


def check_all(rows: Rows, count: int, limit: int) -> None:
    """Pack, unpack, copy and clear, each against plain indexing; nothing else may change."""
    layers = rows.arenas
    before = [layer.clone() for layer in layers]
    expected = torch.cat([raw(layer[1, :, :count]) for layer in before])
    pieces = rows.pieces(count, limit)
    assert [piece.offset for piece in pieces] == [sum(p.nbytes for p in pieces[:i]) for i in range(len(pieces))]
    assert sum(piece.nbytes for piece in pieces) == count * rows.width == expected.numel()
    packed = torch.full((expected.numel(),), 0xAA, dtype=torch.uint8)
    staging = torch.full((max((p.nbytes for p in pieces), default=0) + 32,), 0xAA, dtype=torch.uint8)
    staging = staging.to(layers[0].device)
    for piece in pieces:
        rows.pack(1, piece, staging)
        assert staging[piece.nbytes :].eq(0xAA).all() or len(pieces) > 1
        packed[piece.offset : piece.offset + piece.nbytes] = staging[: piece.nbytes].cpu()
    assert torch.equal(packed, expected)
    for view, layer in zip(rows.layout.views(packed, count), before, strict=True):
        assert torch.equal(raw(view), raw(layer[1, :, :count]))
    check_along(rows, pieces, packed)

    for piece in pieces:
        staging[: piece.nbytes] = packed[piece.offset : piece.offset + piece.nbytes].to(staging.device)
        rows.unpack(staging, 2, piece)
    for layer in before:
        layer[2, :, :count] = layer[1, :, :count]
    assert_equal(layers, before)

    rows.copy(2, [0], count)
    for layer in before:
        layer[0, :, :count] = layer[2, :, :count]
    assert_equal(layers, before)

    rows.clear(1)
    for layer in before:
        layer[1] = 0
    assert_equal(layers, before)


def check_along(rows: Rows, pieces: list[Piece], packed: Tensor) -> None:
    """Pack with another tensor behind the piece, one dtype after the other; the gap between them stays as it was."""
    # Bytes that are no multiple of 16, one byte, several tiles; other dtypes each time.
    along: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((5, 7), torch.bfloat16),
        ((1,), torch.uint8),
        ((3 * triton_rows.TILE // 8 + 3,), torch.float64),
    ]
    for piece in pieces[-1:]:
        for shape, dtype in along:
            bits = torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8)
            extra = bits.view(dtype).squeeze(-1).to(rows.arenas[0].device)
            at = -(-piece.nbytes // 64) * 64 + 64
            out = torch.full((at + extra.nbytes + 32,), 0xAA, dtype=torch.uint8).to(extra.device)
            rows.pack(1, piece, out, extra, at)
            found = out.cpu()
            assert torch.equal(found[: piece.nbytes], packed[piece.offset : piece.offset + piece.nbytes])
            assert torch.equal(found[at : at + extra.nbytes], raw(extra))
            assert found[piece.nbytes : at].eq(0xAA).all() and found[at + extra.nbytes :].eq(0xAA).all()


def assert_equal(found: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(raw(one), raw(other))
