"""Several linear layers of one input on a GPU: the Triton side of ``djinn::linears``.

One launch computes all weights of a call: the grid covers the blocks of columns of one weight after
the other, and a program finds its weight by its number. So the small projections of a layer fill the
GPU together, as if they were packed in one weight, while each stays where the model has it.

One row of ``[N, K]`` is a reduction (:func:`_row`); more rows, padded to a bucket, are a matrix
product (:func:`_rows`). Sums are fp32 in an order that the bucket and the weights' sizes fix, rounded once; a
row's bits do not depend on the other rows, nor on where tensors lie: inputs off 16 bytes are copied.

On Hopper kernels are launched while their predecessor still runs, if it lets them (programmatic
dependent launch): they send for their first weights, which nothing computes, and wait for it before they
read or write anything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from djinn_fx.kernels import linear as twin
from djinn_fx.kernels.backend import jit, tl
from djinn_fx.kernels.linear import MOST_WEIGHTS, Tiles, plan

#: Bytes at whose multiples tensors must begin.
ALIGNMENT = 16

#: Columns that a program of the second kernel adds up.
MERGED = 256

#: How much of ``K`` is on its way to the L2 cache while the predecessor still runs.
AHEAD = 256

#: Bytes of shared memory that the compiler may want beside the operands.
RESERVED = 4096

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
    with torch.cuda.device_of(x):
        (_row if cut.rows == 1 else _rows)[sum(blocks), cut.splits](
            flat, *_padded(list(weights)), parts, *tables, *_padded(firsts, _NEVER)[1:], *_padded(offsets)[1:],
            rows, depth, sum(widths), -(-depth // (cut.splits * cut.depth)) * cut.depth,
            ROWS=cut.rows, COLUMNS=cut.columns, DEPTH=cut.depth, STAGES=stages, SPLITS=cut.splits,
            EVEN=depth % (cut.depth * cut.splits) == 0, TRANSPOSED=transposed, TURNED=cut.turned,
            BIASED=some is not None, AHEAD=ahead if early else 0, EARLY=early, HINTED=hinted, EXACT=not x.is_cuda,
            **options,
        )  # fmt: skip
        if cut.splits > 1:
            merged = [-(-width // MERGED) for width in widths]
            starts = [sum(merged[:index]) for index in range(len(merged))]
            options["num_warps"] = 2
            _merge[sum(merged), rows](
                parts, *tables, *_padded(starts, _NEVER)[1:], *_padded(offsets)[1:],
                rows, sum(widths), COLUMNS=MERGED, SPLITS=cut.splits, BIASED=some is not None, EARLY=early, **options,
            )  # fmt: skip
    return outs


def _stages(x: Tensor, cut: Tiles) -> int:
    """As deep a pipeline as wanted, or as the GPU's shared memory holds; it does not touch bits."""
    if cut.rows == 1 or not x.is_cuda:
        return cut.stages
    device = torch.cuda.get_device_properties(x.device)
    shared: int = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return max(1, min(cut.stages, (shared - RESERVED) // ((cut.columns + cut.rows) * cut.depth * x.itemsize)))


def _padded(items: Sequence[Any], absent: Any = None) -> list[Any]:
    """Items for all of the kernels' weights: the last one, or ``absent``, stands for those not there."""
    return [*items, *[items[-1] if absent is None else absent] * (MOST_WEIGHTS - len(items))]


_RUNTIME = ("f1", "f2", "f3", "c1", "c2", "c3", "h0", "h1", "h2", "h3", "rows", "total")


@jit(do_not_specialize=_RUNTIME)
def _row(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, w3, parts, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3, h0, h1, h2, h3,
    f1, f2, f3, c1, c2, c3, rows, depth, total, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, HINTED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One row ``x`` ``[K]`` times a block of columns of one weight; grid ``[blocks, splits]``.

    Weight ``i`` has ``n_i`` columns, a bias if ``h_i``, its blocks from ``f_i`` on and its columns of
    ``parts`` ``[splits, 1, total]`` from ``c_i`` on. ``run`` is how much of ``K`` a split takes.
    """
    pid = tl.program_id(0)
    w, bias, out, width, has, first, column = w0, b0, o0, n0, h0, f1 * 0, c1 * 0
    if pid >= f1:
        w, bias, out, width, has, first, column = w1, b1, o1, n1, h1, f1, c1
    if pid >= f2:
        w, bias, out, width, has, first, column = w2, b2, o2, n2, h2, f2, c2
    if pid >= f3:
        w, bias, out, width, has, first, column = w3, b3, o3, n3, h3, f3, c3
    begin = tl.program_id(1) * run
    end = tl.minimum(begin + run, depth)
    start_n = (pid - first) * COLUMNS
    c = tl.arange(0, COLUMNS)
    n = start_n + c
    d = tl.arange(0, DEPTH)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(w, start_n, begin, width, depth, COLUMNS, AHEAD, TRANSPOSED)
        tl.extra.cuda.gdc_wait()
    hint: tl.constexpr = "evict_first" if HINTED else ""
    if TRANSPOSED:
        acc = tl.zeros((DEPTH, COLUMNS), tl.float32)
        for k in tl.range(begin, end, DEPTH, num_stages=STAGES):
            at = w + (k + d)[:, None] * width + n[None, :]
            if EVEN:
                weight = tl.load(at, mask=(n < width)[None, :], other=0.0, eviction_policy=hint)
                values = tl.load(x + k + d)
            else:
                live = k + d < end
                weight = tl.load(at, mask=live[:, None] & (n < width)[None, :], other=0.0, eviction_policy=hint)
                values = tl.load(x + k + d, mask=live, other=0.0)
            acc += weight.to(tl.float32) * values.to(tl.float32)[:, None]
        sums = tl.sum(acc, 0)
    else:
        acc = tl.zeros((COLUMNS, DEPTH), tl.float32)
        # Columns that are not there repeat the last one, which needs no mask.
        base = w + start_n.to(tl.int64) * depth
        rest = tl.minimum(c, width - 1 - start_n)[:, None] * depth
        for k in tl.range(begin, end, DEPTH, num_stages=STAGES):
            at = base + rest + (k + d)[None, :]
            if EVEN:
                weight = tl.load(at, eviction_policy=hint)
                values = tl.load(x + k + d)
            else:
                live = k + d < end
                weight = tl.load(at, mask=live[None, :], other=0.0, eviction_policy=hint)
                values = tl.load(x + k + d, mask=live, other=0.0)
            acc += weight.to(tl.float32) * values.to(tl.float32)[None, :]
        sums = tl.sum(acc, 1)
    if SPLITS > 1:
        tl.store(parts + tl.program_id(1) * total + column + n, sums, mask=n < width)
    else:
        if BIASED:
            sums += tl.load(bias + n, mask=(n < width) & (has != 0), other=0.0).to(tl.float32)
        tl.store(out + n, sums.to(out.dtype.element_ty), mask=n < width)


@jit(do_not_specialize=_RUNTIME)
def _rows(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, w3, parts, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3, h0, h1, h2, h3,
    f1, f2, f3, c1, c2, c3, rows, depth, total, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, HINTED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows ``x`` ``[rows, K]`` times a block of columns of one weight; otherwise as :func:`_row`.

    Rows that are not there repeat the last one and are not written.
    """
    pid = tl.program_id(0)
    w, bias, out, width, has, first, column = w0, b0, o0, n0, h0, f1 * 0, c1 * 0
    if pid >= f1:
        w, bias, out, width, has, first, column = w1, b1, o1, n1, h1, f1, c1
    if pid >= f2:
        w, bias, out, width, has, first, column = w2, b2, o2, n2, h2, f2, c2
    if pid >= f3:
        w, bias, out, width, has, first, column = w3, b3, o3, n3, h3, f3, c3
    begin = tl.program_id(1) * run
    end = tl.minimum(begin + run, depth)
    start_n = (pid - first) * COLUMNS
    c = tl.arange(0, COLUMNS)
    n = start_n + c
    d = tl.arange(0, DEPTH)
    m = tl.arange(0, ROWS)
    x_at = x + tl.minimum(m, rows - 1)[:, None] * depth
    base = w + start_n.to(tl.int64) * depth
    rest = tl.minimum(c, width - 1 - start_n)[:, None] * depth
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _prefetch(w, start_n, begin, width, depth, COLUMNS, AHEAD, TRANSPOSED)
        tl.extra.cuda.gdc_wait()
    hint: tl.constexpr = "evict_first" if HINTED else ""
    acc = tl.zeros((COLUMNS, ROWS) if TURNED else (ROWS, COLUMNS), tl.float32)
    for k in tl.range(begin, end, DEPTH, num_stages=STAGES):
        live = k + d < end
        if EVEN:
            values = tl.load(x_at + (k + d)[None, :])
        else:
            values = tl.load(x_at + (k + d)[None, :], mask=live[None, :], other=0.0)
        if TRANSPOSED:
            at = w + (k + d)[:, None] * width + n[None, :]
            if EVEN:
                weight = tl.load(at, mask=(n < width)[None, :], other=0.0, eviction_policy=hint)
            else:
                weight = tl.load(at, mask=live[:, None] & (n < width)[None, :], other=0.0, eviction_policy=hint)
        else:
            at = base + rest + (k + d)[None, :]
            if EVEN:
                weight = tl.load(at, eviction_policy=hint)
            else:
                weight = tl.load(at, mask=live[None, :], other=0.0, eviction_policy=hint)
        if EXACT:
            weight, values = weight.to(tl.float32), values.to(tl.float32)
        if TURNED:
            if TRANSPOSED:
                weight = tl.trans(weight)
            acc = tl.dot(weight, tl.trans(values), acc, input_precision="ieee")
        else:
            if not TRANSPOSED:
                weight = tl.trans(weight)
            acc = tl.dot(values, weight, acc, input_precision="ieee")
    if TURNED:
        acc = tl.trans(acc)
    inside = (m < rows)[:, None] & (n < width)[None, :]
    if SPLITS > 1:
        at = (tl.program_id(1) * rows + m)[:, None] * total + (column + n)[None, :]
        tl.store(parts + at, acc, mask=inside)
    else:
        if BIASED:
            acc += tl.load(bias + n, mask=(n < width) & (has != 0), other=0.0).to(tl.float32)[None, :]
        tl.store(out + m[:, None] * width + n[None, :], acc.to(out.dtype.element_ty), mask=inside)


@jit
def _prefetch(  # type: ignore[no-untyped-def]
    w, start_n, begin, width, depth, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Send for the first ``AHEAD`` of ``K``, of a block of columns, 128 bytes at a time."""
    if TRANSPOSED:
        k = tl.minimum(begin + tl.arange(0, AHEAD), depth - 1)
        n = tl.minimum(start_n + tl.arange(0, (COLUMNS + 63) // 64) * 64, width - 1)
        at = w + k[:, None] * width + n[None, :]
    else:
        k = tl.minimum(begin + tl.arange(0, AHEAD // 64) * 64, depth - 1)
        n = tl.minimum(tl.arange(0, COLUMNS), width - 1 - start_n)
        at = w + start_n.to(tl.int64) * depth + n[:, None] * depth + k[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@jit(do_not_specialize=_RUNTIME)
def _merge(  # type: ignore[no-untyped-def]
    parts, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3, h0, h1, h2, h3, f1, f2, f3, c1, c2, c3, rows, total,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add up the splits of a block of columns of one row, in their order; grid ``[blocks, rows]``."""
    pid, m = tl.program_id(0), tl.program_id(1)
    bias, out, width, has, first, column = b0, o0, n0, h0, f1 * 0, c1 * 0
    if pid >= f1:
        bias, out, width, has, first, column = b1, o1, n1, h1, f1, c1
    if pid >= f2:
        bias, out, width, has, first, column = b2, o2, n2, h2, f2, c2
    if pid >= f3:
        bias, out, width, has, first, column = b3, o3, n3, h3, f3, c3
    n = (pid - first) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts + (split * rows + m) * total + column + n, mask=n < width, other=0.0)
    if BIASED:
        sums += tl.load(bias + n, mask=(n < width) & (has != 0), other=0.0).to(tl.float32)
    tl.store(out + m * width + n, sums.to(out.dtype.element_ty), mask=n < width)
