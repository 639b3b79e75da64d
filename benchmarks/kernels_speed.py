"""Speed of the kernels on a GPU, against what the device's bandwidth allows and against torch.

    python -m benchmarks.kernels_speed --out benchmarks/results/kernels_h200.json

Every figure is a median over repetitions. Kernels are timed inside a CUDA graph of many calls, each
on keys and values of its own, so that they come from memory as in a model whose weights pass
through the cache between two layers. ``floor`` is the bytes that must move over the bandwidth of a
large device-to-device copy, measured in the same run, reads and writes counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from djinn_fx.kernels import kv as kv_torch
from djinn_fx.kernels import pack as packing
from djinn_fx.kernels import triton_attention, triton_kv, triton_prefill

#: Query heads, key-value heads, width of a head.
SHAPES = {"gpt2": (12, 12, 64), "llama-8b": (32, 8, 128)}
DEVICE, DTYPE = "cuda", torch.bfloat16
ROOM = 1024
MIB = 2**20

#: Bytes of keys and values that the calls of a graph read together, several times the L2 cache.
COLD = 400 * MIB

Row = dict[str, Any]


def time_us(call: Callable[[], object], repeats: int = 15) -> float:
    """Median microseconds of a call, by events."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)


def graph_us(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Microseconds per call of a graph of these calls."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_us(graph.replay, repeats) / len(calls)


def queued_us(call: Callable[[], object], calls: int = 10, repeats: int = 5) -> float:
    """Microseconds of device time per call, launched while the device is busy: no gaps for the host."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(found)


def bandwidth() -> float:
    """Bytes per microsecond of a large copy, reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / time_us(lambda: target.copy_(source))


def layers(shape: str, rows: int, length: int, room: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Arenas of as many layers as make the cache cold, and the bytes that one call reads."""
    _, groups, depth = SHAPES[shape]
    read = 2 * rows * groups * length * depth * DTYPE.itemsize
    size = (rows + 2, groups, room + 1, depth)
    count = min(64, max(3, COLD // read))
    return [
        (torch.randn(size, dtype=DTYPE, device=DEVICE), torch.randn(size, dtype=DTYPE, device=DEVICE))
        for _ in range(count)
    ], read


def decode_calls(shape: str, rows: int, length: int, **options: Any) -> tuple[list[Callable[[], object]], int]:
    """A decode step's attention over each of the layers, and the bytes that one must move."""
    heads, _, depth = SHAPES[shape]
    arenas, read = layers(shape, rows, length, max(ROOM, length))
    q = torch.randn(rows, heads, 1, depth, dtype=DTYPE, device=DEVICE)
    order = torch.randperm(rows + 1, device=DEVICE)[:rows]
    lengths = torch.full((rows,), length, device=DEVICE)
    args = (order, lengths[:, None] - 1, lengths, None, None, None, depth**-0.5)
    calls = [partial(triton_attention.decode, q, k, v, *args, **options) for k, v in arenas]
    return list(calls), read + 2 * q.nbytes


def decode(peak: float) -> list[Row]:
    """Attention of a decode step."""
    found = []
    for shape in SHAPES:
        for rows in (1, 32):
            for length in (512, 1024, 8192) if rows == 1 else (512, 1024):
                calls, nbytes = decode_calls(shape, rows, length)
                us = graph_us(calls)
                row = {"shape": shape, "rows": rows, "length": length, "us": us, "floor_us": nbytes / peak}
                found.append({**row, "of_bandwidth": nbytes / peak / us})
    return found


def prefill(peak: float) -> list[Row]:
    """Attention of a chunk of 512 prompt tokens, against torch's SDPA over a view of the row's prefix."""
    found, width = [], 512
    for shape, (heads, groups, depth) in SHAPES.items():
        for base in (0, 512):
            arenas, _ = layers(shape, 1, base + width, ROOM)
            q = torch.randn(1, width, heads, depth, dtype=DTYPE, device=DEVICE).transpose(1, 2)
            end = base + width
            positions = torch.arange(base, end, device=DEVICE)[None]
            rows, lengths = torch.tensor([1], device=DEVICE), torch.tensor([end], device=DEVICE)
            args = (rows, positions, lengths, None, None, None, depth**-0.5)
            ours = [partial(triton_prefill.prefill, q, k, v, *args) for k, v in arenas]
            theirs = [partial(_sdpa, q, k[1:2, :, :end], v[1:2, :, :end], base, heads != groups) for k, v in arenas]
            flops = 4 * heads * depth * width * (base + (width + 1) / 2)
            us, sdpa_us = graph_us(list(ours)), graph_us(list(theirs))
            row = {"shape": shape, "base": base, "width": width, "us": us, "sdpa_us": sdpa_us}
            found.append({**row, "tflops": flops / us / 1e6})
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, base: int, grouped: bool) -> Tensor:
    if base == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = causal_lower_right(q.shape[2], k.shape[2])
    if grouped:
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def kv_write(peak: float) -> list[Row]:
    """The cache write of a step, against torch's indexed assignments."""
    found = []
    for shape, (_, groups, depth) in SHAPES.items():
        for rows, width in ((1, 1), (32, 1), (1, 512)):
            arenas, _ = layers(shape, rows, ROOM, ROOM)
            k, v = (torch.randn(rows, width, groups, depth, dtype=DTYPE, device=DEVICE).transpose(1, 2) for _ in "kv")
            positions = torch.arange(100, 100 + width, device=DEVICE).expand(rows, width).contiguous()
            args = (k, v, torch.randperm(rows + 1, device=DEVICE)[:rows], positions, positions[:, -1] + 1)
            us, torch_us = (
                graph_us([partial(write, *arena, *args) for arena in arenas])
                for write in (triton_kv.kv_write, kv_torch.kv_write)
            )
            row = {"shape": shape, "rows": rows, "width": width, "us": us, "torch_us": torch_us}
            found.append({**row, "floor_us": 2 * (k.nbytes + v.nbytes) / peak})
    return found


def pack(peak: float) -> list[Row]:
    """KV prefixes of 64 tensors and a frame into one buffer and back, against one copy of as many bytes."""
    found = []
    for size in (1, 4, 16, 64, 256):
        count, heads, depth = 64, 8, 128
        length = size * MIB // (count * heads * depth * DTYPE.itemsize)
        arenas = [torch.randn(2, heads, length + 9, depth, dtype=DTYPE, device=DEVICE) for _ in range(count)]
        tensors = [arena[1, :, :length] for arena in arenas] + [torch.randn(1, 4096, dtype=DTYPE, device=DEVICE)]
        nbytes = packing.plan(tensors).nbytes
        buffer, other = (torch.empty(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        row: Row = {"mib": size, "tensors": len(tensors)}
        actions: dict[str, Callable[[], object]] = {
            "copy": partial(other.copy_, buffer),
            "pack": partial(packing.pack, tensors, buffer),
            "unpack": partial(packing.unpack, buffer, tensors),
            "twin": partial(packing.pack_torch, tensors, packing.plan(tensors), buffer),
        }
        for name, action in actions.items():
            us = queued_us(action)
            row |= {f"{name}_us": us, f"{name}_gbs": 2 * nbytes / us / 1e3}
        row["host_us"] = _host_us(actions["pack"])
        row["of_copy"], row["of_bandwidth"] = row["copy_us"] / row["pack_us"], 2 * nbytes / peak / row["pack_us"]
        found.append(row)
    return found


def _host_us(call: Callable[[], object]) -> float:
    """Microseconds until the call returns, the device idle."""
    found = []
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    out = parser.parse_args().out
    torch.manual_seed(0)
    peak = bandwidth()
    result: Row = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(DTYPE),
        "copy_bandwidth_gbs": peak / 1e3,
    }
    for part in (decode, prefill, kv_write, pack):
        result[part.__name__] = [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in part(peak)
        ]
        print(part.__name__)
        for row in result[part.__name__]:
            print("  " + "  ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
