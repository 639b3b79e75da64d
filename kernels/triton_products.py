"""The kernels of linear layers; :mod:`djinn_fx.kernels.triton_linear` launches them.

``INTO`` says what follows a product of one weight: 0 nothing, 1 a residual is added, 2 that sum is scaled and moved
by a row's edits, 3 it may be replaced as well. All of it is elementwise, each step rounded to the
result's dtype as the ops of a graph round, so bits do not depend on where it is computed. What the host wrote (edits)
is sent for before the predecessor has ended, like weights. The kernel of one row reads it no earlier than at the end of
its loop: with more registers in the loop, a multiprocessor would hold fewer programs than it takes to hide memory.
``SLOTS`` rows of ``read`` and ``write`` are sent for as well, where splits are added up, for whoever comes next;
nothing here reads them.
"""

from __future__ import annotations

from djinn_fx.kernels.backend import jit, tl

_RUNTIME = ("f1", "f2", "f3", "c1", "c2", "c3", "h0", "h1", "h2", "h3", "rows", "total")


@jit(do_not_specialize=_RUNTIME)
def product_of_row(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, w3, parts, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3, h0, h1, h2, h3,
    f1, f2, f3, c1, c2, c3, residual, act, scale, add, inject, tap, rows, depth, total, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, HINTED: tl.constexpr, EXACT: tl.constexpr, INTO: tl.constexpr,
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
        if SPLITS == 1 and INTO > 1:
            _send_for(scale, start_n, width, COLUMNS)
            _send_for(add, start_n, width, COLUMNS)
        tl.extra.cuda.gdc_wait()
    hint: tl.constexpr = "evict_first" if HINTED else ""
    if SPLITS == 1 and INTO > 0:
        on, put = _flags(act, inject, 0, INTO)
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
    if SPLITS == 1 and INTO > 0:
        kept = tl.load(residual + n, mask=n < width, other=0.0)
        edits = _edits(on, put, scale, add, tap, n, n < width, INTO)
    sums = tl.sum(acc, 0 if TRANSPOSED else 1)
    if SPLITS > 1:
        tl.store(parts + tl.program_id(1) * total + column + n, sums, mask=n < width)
    else:
        if BIASED:
            sums += tl.load(bias + n, mask=(n < width) & (has != 0), other=0.0).to(tl.float32)
        made = sums.to(out.dtype.element_ty)
        if INTO > 0:
            made = _joined(made, kept, edits, INTO)
        tl.store(out + n, made, mask=n < width)


@jit(do_not_specialize=_RUNTIME)
def product_of_rows(  # type: ignore[no-untyped-def]
    x, w0, w1, w2, w3, parts, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3, h0, h1, h2, h3,
    f1, f2, f3, c1, c2, c3, residual, act, scale, add, inject, tap, rows, depth, total, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
    EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, TURNED: tl.constexpr, BIASED: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr, HINTED: tl.constexpr, EXACT: tl.constexpr, INTO: tl.constexpr,
):  # fmt: skip
    """Rows ``x`` ``[rows, K]`` times a block of columns of one weight; otherwise as :func:`product_of_row`.

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
        made = acc.to(out.dtype.element_ty)
        at = m[:, None] * width + n[None, :]
        if INTO > 0:
            there = tl.minimum(m, rows - 1)[:, None]
            kept = tl.load(residual + at, mask=inside, other=0.0)
            on, put = _flags(act, inject, there, INTO)
            made = _joined(made, kept, _edits(on, put, scale, add, tap, at, inside, INTO), INTO)
        tl.store(out + at, made, mask=inside)


@jit
def _to_l2(at):  # type: ignore[no-untyped-def]
    """Send for the lines of some addresses, without waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


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
    _to_l2(at)


@jit(do_not_specialize=_RUNTIME)
def merge_splits(  # type: ignore[no-untyped-def]
    parts, b0, b1, b2, b3, o0, o1, o2, o3, n0, n1, n2, n3, h0, h1, h2, h3, f1, f2, f3, c1, c2, c3,
    residual, act, scale, add, inject, tap, read, write, rows, total,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, EARLY: tl.constexpr, INTO: tl.constexpr,
    SLOTS: tl.constexpr,
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
    at = m * width + n
    if INTO > 0:
        on, put = _flags(act, inject, m, INTO)
        edits = _edits(on, put, scale, add, tap, at, n < width, INTO)
    if EARLY:
        skipped = m * SLOTS * width
        _send_for_slots(read + skipped, write + skipped, (pid - first) * COLUMNS, width, COLUMNS, SLOTS)
        tl.extra.cuda.gdc_wait()
    if INTO > 0:
        kept = tl.load(residual + at, mask=n < width, other=0.0)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts + (split * rows + m) * total + column + n, mask=n < width, other=0.0)
    if BIASED:
        sums += tl.load(bias + n, mask=(n < width) & (has != 0), other=0.0).to(tl.float32)
    made = sums.to(out.dtype.element_ty)
    if INTO > 0:
        made = _joined(made, kept, edits, INTO)
    tl.store(out + at, made, mask=n < width)


@jit
def _send_for(table, start_n, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Send for a block of columns of one row of a table in fp32, 128 bytes at a time."""
    at = table + tl.minimum(start_n + tl.arange(0, (COLUMNS + 31) // 32) * 32, width - 1)
    _to_l2(at)


@jit
def _send_for_slots(  # type: ignore[no-untyped-def]
    read, write, start_n, width, COLUMNS: tl.constexpr, SLOTS: tl.constexpr
):
    """Send for a block of columns of a row's slots in two tables, which whoever comes next will read."""
    for slot in tl.static_range(SLOTS):
        _send_for(read + slot * width, start_n, width, COLUMNS)
        _send_for(write + slot * width, start_n, width, COLUMNS)


@jit
def _flags(act, inject, m, INTO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether row ``m`` is edited, and whether something is injected; zeros where ``INTO`` needs neither."""
    on = tl.full((1,), 0, tl.int1)
    put = on
    if INTO > 1:
        on = tl.load(act + m) != 0
    if INTO > 2:
        put = tl.load(inject + m) != 0
    return on, put


@jit
def _edits(on, put, scale, add, tap, at, inside, INTO: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the elements ``at`` of a row are edited with, and its flags; what they do not need is not read."""
    factor, term, instead = on, on, on
    if INTO > 1:
        factor = tl.load(scale + at, mask=inside & on, other=1.0)
        term = tl.load(add + at, mask=inside & on, other=0.0)
    if INTO > 2:
        instead = tl.load(tap + at, mask=inside & put, other=0.0)
    return on, factor, term, put, instead


@jit
def _joined(made, kept, edits, INTO: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product, joined with its residual ``kept`` and with what :func:`_edits` read."""
    dtype: tl.constexpr = made.dtype
    on, factor, term, put, instead = edits
    value = (kept.to(tl.float32) + made.to(tl.float32)).to(dtype)
    if INTO > 1:
        scaled = (value.to(tl.float32) * factor).to(dtype)
        value = tl.where(on, (scaled.to(tl.float32) + term).to(dtype), value)
    if INTO > 2:
        value = tl.where(put, instead, value)
    return value
