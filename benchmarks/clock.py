"""Clocks: seconds between synchronisations, device bandwidth, memory in use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

Device = torch.device

#: Cycles that a device sleeps while the host enqueues what is to be timed: about a millisecond.
COVER = 2_000_000


def synchronize(device: Device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: Device, call: Callable[[], object]) -> float:
    """Wall-clock seconds of a call between two synchronisations: device and host work."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def dispatch_seconds(device: Device, call: Callable[[], object]) -> float:
    """Wall-clock seconds until a call returns, the device idle before it and not waited for after it."""
    synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read_bandwidth(device: Device, nbytes: int = 1 << 31) -> float:
    """Bytes per second that the device reads and writes in a large copy on itself; the best of many."""
    if device.type != "cuda":
        nbytes = min(nbytes, 1 << 27)
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    fastest = min(device_seconds(device, lambda: target.copy_(source)) for _ in range(10))
    return 2 * nbytes / fastest


def device_seconds(device: Device, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Seconds of device work alone: by events on CUDA, enqueued while the device is busy, so the host's part is hidden.

    Args:
        device: where the work runs; on the CPU the host's work is the device's.
        call: enqueues the work, on the current stream.
        before: enqueues what comes right before it and is not timed.
    """
    if device.type != "cuda":
        before()
        return seconds(device, call)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(COVER)
    before()
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def device_used(device: Device) -> int:
    """Bytes of a CUDA device that are not free, whoever has them; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def memory_in_use(device: Device) -> int:
    """Bytes of live tensors on a CUDA device; on the CPU the process's resident bytes."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident()


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def clear(device: Device) -> None:
    """Give back what nobody holds any more."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
