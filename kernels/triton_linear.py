"""Several linear layers of one input on a GPU: the Triton side of ``djinn::linears``.

One launch computes all weights of a call: the grid covers the blocks of columns of one weight after
the other, and a program finds its weight by its number. So the small projections of a layer fill the
GPU together, as if they were packed in one weight, while each stays where the model has it.

One row of ``[N, K]`` is a reduction; more rows, padded to a bucket, are a matrix product
(:mod:`djinn_fx.kernels.triton_products`). Sums are fp32 in an order that the bucket and the weights' sizes fix,
rounded once; a row's bits do not depend on the other rows, nor on where tensors lie: inputs off 16 bytes are copied.

On Hopper kernels are launched while their predecessor still runs, if it lets them (programmatic
dependent launch): they send for their first weights and for edits, which no kernel beside them computes, and
wait for it before they read or write anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels import linear as twin
from djinn_fx.kernels.linear import MOST_WEIGHTS, Into, Tiles, plan
from djinn_fx.kernels.triton_products import merge_splits, product_of_row, product_of_rows

#: Bytes at whose multiples tensors must begin.
ALIGNMENT = 16

#: Columns that a program of the second kernel adds up.
MERGED = 256

#: How much of ``K`` is on its way to the L2 cache while the predecessor still runs.
AHEAD = 256

#: Bytes of shared memory that the compiler may want beside the operands.
RESERVED = 4096

#: Registers of a thread where a row is joined with its edits: as many as without them, or programs wait for a place.
REGISTERS = 64

#: Bytes of tables that are sent for at most. On an H200 a step of GPT-2 of 32 rows, 384 KiB, gained 1 %; one of the
#: 8B shape lost 0.2 %, with 2 MiB at 32 rows.
MOST_SOON = 2**19

#: Number of a block that no grid reaches: where an absent weight would begin.
_NEVER = 2**31 - 1


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], transposed: Sequence[bool]
) -> list[Tensor]:
    """See :class:`djinn_fx.kernels.signatures.Linears`; what the kernels do not take is left to torch."""
    if len(set(transposed)) > 1:
        each = zip(weights, biases, transposed, strict=True)
        return [linears(x, [weight], [bias], [layout])[0] for weight, bias, layout in each]
    depth, widths = x.shape[-1], [weight.shape[0 if not transposed[0] else 1] for weight in weights]
    cut = plan(x.numel() // max(depth, 1), depth, widths, transposed[0], x.dtype)
    if cut is None or not all(_readable(tensor, x.dtype) for tensor in (*weights, *biases)):
        return twin.linears(x, weights, biases, transposed)
    return launch(x, weights, biases, transposed[0], cut)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    residual: Tensor,
    act: Tensor | None,
    scale: Tensor | None,
    add: Tensor | None,
    inject: Tensor | None,
    tap: Tensor | None,
    soon: Sequence[Tensor],
) -> Tensor:
    """See :class:`djinn_fx.kernels.signatures.LinearResidual`; what the kernels do not take is left to torch."""
    into = Into(residual, act, scale, add, inject, tap, tuple(soon))
    depth, width = x.shape[-1], residual.shape[-1]
    cut = plan(x.numel() // max(depth, 1), depth, [width], transposed, x.dtype)
    if cut is None or not all(_readable(tensor, x.dtype) for tensor in (weight, bias)) or not _joinable(into):
        return twin.linear_residual(x, weight, bias, transposed, residual, act, scale, add, inject, tap, soon)
    return launch(x, [weight], [bias], transposed, cut, into=into)[0].view(residual.shape)


def _joinable(into: Into) -> bool:
    """Whether the kernels can read what a product is joined with."""
    tables = [table for table in (into.scale, into.add) if table is not None]
    others = [table for table in (into.act, into.inject, into.tap) if table is not None]
    flat = all(table.is_contiguous() for table in (*tables, *others))
    return flat and all(table.dtype == torch.float32 for table in tables)


def _readable(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels can read a weight or bias; they do not check again."""
    if tensor is None:
        return True
    return tensor.dtype == dtype and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    transposed: bool,
    cut: Tiles,
    *,
    early: bool | None = None,
    hinted: bool | None = None,
    ahead: int = AHEAD,
    into: Into | None = None,
) -> list[Tensor]:
    """Compute by the kernels what :func:`djinn_fx.kernels.linear.plan` allows them.

    Args:
        x: ``[..., K]`` in bf16 or fp16, any strides.
        weights: ``[N, K]`` each, or ``[K, N]``; contiguous.
        biases: ``[N]`` each, or None.
        transposed: whether the weights are ``[K, N]``.
        cut: from :func:`djinn_fx.kernels.linear.plan`, or another one for measurements.
        early: launch before the predecessor has ended; None: where the GPU can.
        hinted: tell the cache that weights are read once; None: where sums are reductions, which it helped.
        ahead: how much of ``K`` to prefetch before the predecessor has ended; for measurements.
        into: what the product of a single weight is joined with.

    Returns:
        ``[..., N]`` per weight, contiguous.
    """
    depth = x.shape[-1]
    flat = x.reshape(-1, depth).contiguous()
    if flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()
    rows = flat.shape[0]
    widths = [weight.shape[1 if transposed else 0] for weight in weights]
    outs = [x.new_empty(*x.shape[:-1], width) for width in widths]
    if early is None:
        early = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    if hinted is None:
        hinted = cut.rows == 1
    blocks = [-(-width // cut.columns) for width in widths]
    firsts = [sum(blocks[:index]) for index in range(len(blocks))]
    some = next((bias for bias in biases if bias is not None), None)
    parts = x.new_empty(cut.splits, rows, sum(widths), dtype=torch.float32) if cut.splits > 1 else flat
    offsets = [sum(widths[:index]) for index in range(len(widths))]
    flags = [bias is not None for bias in biases]
    joined, level = _operands(into, flat)
    tables: tuple[Any, ...] = (
        *_padded([bias if bias is not None else some if some is not None else flat for bias in biases]),
        *_padded(outs),
        *_padded(widths),
        *_padded([int(flag) for flag in flags]),
    )
    stages = _stages(x, cut)
    options: dict[str, Any] = {"num_warps": cut.warps, "num_stages": stages}
    if early:
        options["launch_pdl"] = True
    if level > 1 and cut.rows == cut.splits == 1 and x.is_cuda:
        options["maxnreg"] = REGISTERS
    with torch.cuda.device_of(x):
        (product_of_row if cut.rows == 1 else product_of_rows)[sum(blocks), cut.splits](
            flat, *_padded(list(weights)), parts, *tables, *_padded(firsts, _NEVER)[1:], *_padded(offsets)[1:],
            *joined, rows, depth, sum(widths), -(-depth // (cut.splits * cut.depth)) * cut.depth,
            ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=cut.depth, STAGES=stages, SPLITS=cut.splits,
            EVEN=depth % (cut.depth * cut.splits) == 0, TRANSPOSED=transposed, TURNED=cut.turned,
            BIASED=some is not None, AHEAD=ahead if early else 0, EARLY=early, HINTED=hinted, EXACT=not x.is_cuda,
            INTO=level, **options,
        )  # fmt: skip
        if cut.splits > 1:
            merged = [-(-width // MERGED) for width in widths]
            starts = [sum(merged[:index]) for index in range(len(merged))]
            options["num_warps"] = 2
            soon = _sendable(into)
            merge_splits[sum(merged), rows](
                parts, *tables, *_padded(starts, _NEVER)[1:], *_padded(offsets)[1:],
                *joined, *(soon or (flat, flat)), rows, sum(widths),
                COLUMNS=MERGED, SPLITS=cut.splits, BIASED=some is not None, EARLY=early, INTO=level,
                SLOTS=soon[0].shape[1] if soon else 0, **options,
            )  # fmt: skip
    return outs


def _stages(x: Tensor, cut: Tiles) -> int:
    """As deep a pipeline as wanted, or as the GPU's shared memory holds; it does not touch bits."""
    if cut.rows == 1 or not x.is_cuda:
        return cut.stages
    device = torch.cuda.get_device_properties(x.device)
    shared: int = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return max(1, min(cut.stages, (shared - RESERVED) // ((cut.columns + cut.rows) * cut.depth * x.itemsize)))


def _operands(into: Into | None, absent: Tensor) -> tuple[list[Tensor], int]:
    """What the kernels join a product with, ``absent`` for what they do not, and which of it they do."""
    if into is None:
        return [absent] * 6, 0
    tables = (into.act, into.scale, into.add, into.inject, into.tap)
    level = 1 if into.act is None else 2 if into.inject is None else 3
    return [into.residual.contiguous(), *(absent if table is None else table for table in tables)], level


def _sendable(into: Into | None) -> tuple[Tensor, ...]:
    """The two tables that are worth being sent for: of many bytes it costs more than it saves."""
    if into is None or len(into.soon) != 2 or sum(table.nbytes for table in into.soon) > MOST_SOON:
        return ()
    sizes = (into.residual.shape[0], into.soon[0].shape[1], into.residual.shape[-1])
    fit = all(table.shape == sizes and table.is_contiguous() and table.dtype == torch.float32 for table in into.soon)
    return into.soon if fit else ()


def _padded(items: Sequence[Any], absent: Any = None) -> list[Any]:
    """Items for all of the kernels' weights: the last one, or ``absent``, stands for those not there."""
    return [*items, *[items[-1] if absent is None else absent] * (MOST_WEIGHTS - len(items))]
