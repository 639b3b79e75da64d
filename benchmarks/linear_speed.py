"""Speed of a decode step's linear layers on a GPU, against cuBLAS and against the bandwidth.

    python -m benchmarks.linear_speed --check --out benchmarks/results/linear_h200.json
    python -m benchmarks.linear_speed --tune tiles.json

Every figure is the median over repetitions of a CUDA graph of many calls, each on weights of its own,
so that they come from memory. ``us`` is one call after the other; ``after`` is a call behind a small
elementwise kernel that writes its input, as in a model, less that kernel's own time, and ``after_early``
the same behind one that lets its successor start early. ``floor_us`` is the
weights' bytes over the bandwidth of a large device-to-device copy of the same run, reads and writes
counted. ``packed`` is one cuBLAS call on the weights in one tensor, ``separate`` one call per weight; of
a single weight they are the same call, timed twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from djinn_fx.benchmarks.kernels_speed import bandwidth, graph_us
from djinn_fx.kernels import linear as twin
from djinn_fx.kernels.linear import BUCKETS, Tiles, plan
from djinn_fx.kernels.triton_linear import launch, linears

#: K, the weights' N, whether they are [K, N] with a bias.
SHAPES: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "qkv": (4096, (4096, 1024, 1024), False),
    "o": (4096, (4096,), False),
    "gate_up": (4096, (14336, 14336), False),
    "down": (14336, (4096,), False),
    "head": (4096, (128256,), False),
    "gpt2_qkv": (768, (2304,), True),
    "gpt2_proj": (768, (768,), True),
    "gpt2_fc": (768, (3072,), True),
    "gpt2_fc2": (3072, (768,), True),
    "gpt2_head": (768, (50257,), False),
}
DEVICE, DTYPE = "cuda", torch.bfloat16

#: Bytes of weights that the calls of a graph read together, several times the L2 cache.
COLD = 400 * 2**20

#: Shared memory of a program on Hopper, less what the compiler needs beside the operands.
SHARED = 220 * 1024

#: How a call is timed: see :func:`timed_us`.
MODES = ("us", "after", "after_early")

Row = dict[str, Any]
Call = Callable[[], object]


def operands(name: str, count: int | None = None) -> list[tuple[list[Tensor], list[Tensor | None]]]:
    """Weights and biases of as many layers as make the cache cold, scaled to keep results near 1."""
    depth, widths, transposed = SHAPES[name]
    count = count or min(64, max(2, COLD // (2 * depth * sum(widths))))
    made: list[tuple[list[Tensor], list[Tensor | None]]] = []
    for _ in range(count):
        sizes = [(depth, width) if transposed else (width, depth) for width in widths]
        weights = [torch.randn(*size, dtype=DTYPE, device=DEVICE) * depth**-0.5 for size in sizes]
        biases = [torch.randn(width, dtype=DTYPE, device=DEVICE) if transposed else None for width in widths]
        made.append((weights, biases))
    return made


def candidates(rows: int, name: str) -> Iterator[Tiles]:
    """The cuts that are worth trying."""
    depth, widths, transposed = SHAPES[name]
    narrow = sum(widths) <= 8192
    if rows == 1:
        yield from _reductions(transposed, narrow)
        if not transposed:
            return
    rows = max(rows, 16)
    sizes = [(64, 128, 4), (64, 128, 5), (64, 128, 6), (64, 64, 6), (64, 64, 8), (32, 128, 4), (32, 128, 6)]
    sizes += [(64, 256, 2), (64, 256, 3), (32, 256, 3), (32, 256, 5), (128, 128, 3), (128, 128, 4), (128, 64, 6)]
    sizes += [(32, 64, 8), (16, 128, 6), (16, 256, 5), (16, 64, 8), (128, 64, 8)]
    for (columns, tile, stages), turned in itertools.product(sizes, (False, True)):
        if (turned and columns < 32) or 2 * (columns + rows) * tile * stages > SHARED:
            continue
        for warps in (4, 8) if columns == 128 else (4,):
            cut = Tiles(rows, columns, tile, warps, stages, 1, turned)
            yield cut
            if narrow and columns >= 32 and (tile, stages) == (128, 4):
                yield from (replace(cut, splits=splits) for splits in (2, 3, 4, 8) if depth >= 256 * splits)


def _reductions(transposed: bool, narrow: bool) -> Iterator[Tiles]:
    if transposed:
        sizes = [(16, 512, 8), (32, 256, 8), (16, 256, 4), (8, 1024, 8), (8, 512, 4), (16, 256, 8), (16, 1024, 8)]
        sizes += [
            (16, 1024, 16),
            (8, 1024, 16),
            (32, 512, 16),
            (32, 512, 8),
            (32, 1024, 16),
            (8, 2048, 16),
            (8, 256, 4),
        ]
        sizes += [(8, 4096, 16), (16, 2048, 16), (64, 256, 16), (32, 1024, 32), (16, 1024, 32)]
        parts = [(16, 256, 4), (32, 128, 4), (64, 64, 4), (32, 256, 8), (64, 128, 8), (64, 256, 8), (16, 512, 8)]
    else:
        sizes = [(4, 512, 4), (4, 1024, 4), (8, 1024, 8), (4, 1024, 8), (2, 1024, 4), (4, 256, 2), (1, 4096, 8)]
        sizes += [(2, 2048, 8), (2, 1024, 2), (1, 2048, 2), (2, 4096, 8), (4, 4096, 16), (8, 2048, 16), (1, 4096, 4)]
        sizes += [(4, 512, 2), (8, 256, 2), (4, 2048, 8), (1, 2048, 4), (8, 512, 4), (32, 128, 4), (16, 256, 4)]
        sizes += [(4, 256, 1), (16, 128, 2), (32, 256, 8), (8, 512, 2), (1, 1024, 1), (16, 128, 4), (64, 128, 8)]
        parts = [(4, 512, 4), (4, 1024, 4), (8, 512, 4)]
    for columns, tile, warps in sizes:
        yield from (Tiles(1, columns, tile, warps, stages) for stages in (1, 3))
    if narrow:
        for (columns, tile, warps), splits in itertools.product(parts, (2, 3, 4, 6, 8)):
            yield Tiles(1, columns, tile, warps, 1, splits)


def compile_one(rows: int, depth: int, width: int, transposed: bool, cut: Tiles, options: dict[str, Any]) -> str:
    """Compile a cut into the cache on disk, by a call on few columns; what went wrong, if anything."""
    x = torch.randn(rows, depth, dtype=DTYPE, device=DEVICE)
    weight = torch.randn(*((depth, width) if transposed else (width, depth)), dtype=DTYPE, device=DEVICE)
    bias = torch.randn(width, dtype=DTYPE, device=DEVICE) if transposed else None
    try:
        launch(x, [weight], [bias], transposed, cut, **options)
        torch.cuda.synchronize()
    except Exception as error:  # a cut that does not fit is one less to try
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _job(rows: int, name: str, cut: Tiles) -> tuple[int, int, int, bool, Tiles]:
    """What decides how a cut is compiled: the sizes but for their multiples."""
    depth, widths, transposed = SHAPES[name]
    step = cut.depth * cut.splits
    return rows, step * 2 + (depth % step and 16), 128 + widths[0] % 16, transposed, cut


def tune(out: Path, seconds: float) -> dict[tuple[int, str], Tiles]:
    """Time every candidate for every shape, until the time is over, and write what was found."""
    start = time.perf_counter()
    tasks = [(rows, name, cut) for rows in (1, 32, 16, 64) for name in SHAPES for cut in candidates(rows, name)]
    jobs = list(dict.fromkeys(_job(*task) for task in tasks))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(14, mp_context=context) as pool:
        verdicts = list(pool.map(compile_one, *zip(*jobs, strict=True), [{}] * len(jobs), chunksize=2))
        bad = {job: verdict for job, verdict in zip(jobs, verdicts, strict=True) if verdict}
        print(f"compiled {len(jobs)}, {len(bad)} do not fit, {time.perf_counter() - start:.0f} s", flush=True)
        found: list[Row] = []
        weights = {name: operands(name) for name in SHAPES}
        best: dict[tuple[int, str], Tiles] = {}
        for rows, name in itertools.product((1, 32, 16, 64), SHAPES):
            if time.perf_counter() - start > seconds:
                print("out of time before", rows, name, flush=True)
                break
            x = torch.randn(rows, SHAPES[name][0], dtype=DTYPE, device=DEVICE)
            timed = []
            for cut in candidates(rows, name):
                if _job(rows, name, cut) not in bad:
                    calls: list[Call] = []
                    for w, b in weights[name]:
                        calls += [partial(launch, x, w, b, SHAPES[name][2], cut), partial(x.mul_, 1.0)]
                    timed.append((2 * graph_us(calls, 7), cut))
            timed.sort(key=lambda pair: pair[0])
            best[rows, name] = timed[0][1]
            found += [{"shape": name, "rows": rows, "us": us, **asdict(cut)} for us, cut in timed[:12]]
            print(name, rows, [(round(us, 2), *asdict(cut).values()) for us, cut in timed[:4]], flush=True)
        combos: list[dict[str, Any]] = [{"ahead": 0}, {"ahead": 256}, {"ahead": 1024}, {"hinted": True, "ahead": 256}]
        chosen = [(rows, name) for rows, name in best if rows in (1, 32)]
        more = [(*_job(r, n, best[r, n]), combo) for r, n in chosen for combo in combos]
        list(pool.map(compile_one, *zip(*more, strict=True)))
    flags: list[Row] = []
    for rows, name in chosen:
        for combo in combos:
            made = partial(launch, transposed=SHAPES[name][2], cut=best[rows, name], **combo)
            row = {"shape": name, "rows": rows, **combo}
            call = partial(_spread, made)
            flags.append({**row, **{key: timed_us(rows, name, weights[name], call, key) for key in MODES}})
        print(name, rows, [tuple(round(f[key], 2) for key in MODES) for f in flags[-len(combos) :]], flush=True)
    out.write_text(json.dumps({"tiles": found, "bad": [str(item) for item in bad.items()][:50], "flags": flags}) + "\n")
    return best


def _spread(made: Callable[..., object], x: Tensor, w: list[Tensor], b: list[Tensor | None]) -> object:
    return made(x, w, b)


@triton.jit
def _touch(x, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A small kernel that lets its successor start early, as Inductor's do with ``triton.enable_pdl``."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    at = x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < count
    tl.store(at, tl.load(at, mask=live), mask=live)


def timed_us(
    rows: int,
    name: str,
    weights: list[tuple[list[Tensor], list[Tensor | None]]],
    call: Callable[..., object],
    mode: str,
) -> float:
    """Microseconds of a call: among its like, or behind a small kernel less that kernel's own time."""
    x = torch.randn(rows, SHAPES[name][0], dtype=DTYPE, device=DEVICE)
    ours: list[Call] = [partial(call, x, w, b) for w, b in weights]
    if mode == "us":
        return graph_us(ours, 15)
    small: Call = partial(x.mul_, 1.0)
    if mode == "after_early":
        small = partial(_touch[(triton.cdiv(x.numel(), 1024),)], x, x.numel(), BLOCK=1024, launch_pdl=True)
    alone = graph_us([small] * 64, 15)
    return 2 * graph_us([step for one in ours for step in (one, small)], 15) - alone


def check() -> None:
    """Compare with fp64 and with cuBLAS, and rows alone with rows among others.

    Errors are in half units in the last place, beside what fp32 sums of ``K`` products near 1 may lose.
    """
    worst = {"kernels": 0.0, "cublas": 0.0}
    for (name, (depth, widths, transposed)), rows in itertools.product(SHAPES.items(), (1, 2, 16, 31, 33, 64)):
        for dtype in (torch.bfloat16, torch.float16) if name.endswith(("qkv", "fc2")) else (DTYPE,):
            ((weights, biases),) = operands(name, 1)
            weights = [weight.to(dtype) for weight in weights]
            biases = [None if bias is None else bias.to(dtype) for bias in biases]
            x = torch.randn(rows, 1, depth, dtype=dtype, device=DEVICE)
            layouts = [transposed] * len(widths)
            found = linears(x, weights, biases, layouts)
            others = x.roll(1, 0).clone()
            others[0] = float("nan") if rows > 1 else others[0]
            moved = linears(others, weights, biases, layouts)
            again = linears(x, weights, biases, layouts)
            theirs = twin.linears(x, weights, biases, layouts)
            for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                wanted = x.double() @ (weight if transposed else weight.t()).double()
                wanted = wanted if bias is None else wanted + bias.double()
                allowed = wanted.abs() * torch.finfo(dtype).eps / 2 + 4e-7 * depth**0.5
                for who, out in (("kernels", found[index]), ("cublas", theirs[index])):
                    error = ((out.double() - wanted).abs() / allowed).max().item()
                    worst[who] = max(worst[who], error) if error == error else float("inf")
                out, other = found[index], moved[index]
                assert again[index].eq(out).all(), (name, rows, dtype, "not deterministic")
                same = other[1:].eq(out[:-1]).all() if rows > 1 else other.eq(out).all()
                assert bool(same) or plan(rows, depth, widths, transposed, dtype) is None, (name, rows, dtype)
    print(f"check: rows independent, calls equal, errors {worst}", flush=True)
    assert worst["kernels"] < 1.1, worst


def _by_torch(layouts: list[bool], x: Tensor, w: list[Tensor], b: list[Tensor | None]) -> object:
    return twin.linears(x, w, b, layouts)


def measure(peak: float, best: dict[tuple[int, str], Tiles]) -> list[Row]:
    """The operator, cuBLAS on separate and cuBLAS on packed weights."""
    found = []
    for name, (depth, widths, transposed) in SHAPES.items():
        weights = operands(name)
        joined: list[tuple[list[Tensor], list[Tensor | None]]] = weights
        if len(widths) > 1:
            joined = [([torch.cat(w, 1 if transposed else 0)], [None]) for w, _ in weights]
        for rows in BUCKETS:
            cut = best.get((rows, name)) or plan(rows, depth, widths, transposed, DTYPE)
            assert cut is not None
            made = partial(_spread, partial(launch, transposed=transposed, cut=cut))
            row: Row = {"shape": name, "rows": rows, "mb": 2 * depth * sum(widths) / 1e6}
            row |= {mode: timed_us(rows, name, weights, made, mode) for mode in MODES}
            apart, packed = (partial(_by_torch, [transposed] * count) for count in (len(widths), 1))
            row |= {f"separate_{mode}": timed_us(rows, name, weights, apart, mode) for mode in MODES[:2]}
            row |= {f"packed_{mode}": timed_us(rows, name, joined, packed, mode) for mode in MODES[:2]}
            row["floor_us"] = 2 * depth * sum(widths) / peak
            found.append({**row, "tb_s": row["mb"] / row["us"], "choice": asdict(cut)})
            print(
                "  ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in found[-1].items()),
                flush=True,
            )
        del weights, joined
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with fp64 first")
    parser.add_argument("--tune", type=Path, help="time every candidate and write the best to this file")
    parser.add_argument("--seconds", type=float, default=200.0, help="when to stop tuning")
    parser.add_argument("--out", type=Path, help="measure and write the figures as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.check:
        check()
    best: dict[tuple[int, str], Tiles] = {}
    if args.tune is not None:
        best = tune(args.tune, args.seconds)
    if args.out is not None:
        peak = bandwidth()
        result: Row = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "dtype": str(DTYPE),
            "copy_bandwidth_gbs": peak / 1e3,
        }
        rows = [{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in measure(peak, best)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**result, "linears": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
