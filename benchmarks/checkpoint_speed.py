"""Speed of checkpoints, offloads and forks on a GPU, beside what torch alone does.

    python -m benchmarks.checkpoint_speed --out benchmarks/results/checkpoints_h200.json

Calls are timed on the host: ``call_us`` until the call returns, with the device idle; ``busy_call_us`` with the device
busy for longer than any copy takes, so that a call which waits for it would show; ``safe_us`` until every byte is in
pinned memory. Copies on the device are timed by events. Figures are medians.
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import djinn_fx as djinn
from djinn_fx.program import KVSpec
from djinn_fx.runtime.arena import KVArena
from djinn_fx.runtime.parcels import Sent
from djinn_fx.runtime.pinned import HostPool
from djinn_fx.runtime.transfer import Transfer

DEVICE, DTYPE = "cuda", torch.bfloat16
MIB = 2**20

#: Cycles of the device's clock that a busy device sleeps: about 10 ms.
BUSY = 20_000_000

Row = dict[str, Any]


def host_us(call: Callable[[], object], *, busy: bool = False, safe: bool = False, repeats: int = 50) -> float:
    """Median microseconds until ``call`` returns; with ``safe`` until what it gives has been waited for."""
    found: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(BUSY)
        start = time.perf_counter()
        made: Any = call()
        if safe:
            made.wait() if hasattr(made, "wait") else torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e6)
        del made
    torch.cuda.synchronize()
    return statistics.median(found)


def device_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds of device time of a call, launched while the device is busy."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY // 5)
        start.record()
        made = call()
        if isinstance(made, Sent) and made.arrived is not None:
            torch.cuda.current_stream().wait_event(made.arrived)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)


def gpt2() -> Any:
    """GPT-2's shape, random weights."""
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=None))
    return model.to(DEVICE, DTYPE).eval()


def thin_8b() -> Any:
    """The KV of the 8B shape (32 layers, 8 heads of 128) under tiny weights."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=512,
        bos_token_id=1,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(DEVICE, DTYPE).eval()


def compiled(model: Any, **options: Any) -> djinn.Dj:
    made: djinn.Dj = djinn.compile(model, sites="resid_post", backend="eager", verify=False, max_sessions=4, **options)
    made.warmup()
    return made


def calls(name: str, dj: djinn.Dj, tokens: int) -> list[Row]:
    """Checkpoints of a session stopped in its prompt, stopped while decoding, and between runs; offload and return."""
    prompt = (torch.arange(tokens) * 7 % 500 + 3).tolist()
    found = []
    for where in ("prompt", "decode", "between runs"):
        with dj.session() as session:
            if where == "between runs":
                session.forward(prompt).result()
            else:
                points = djinn.break_at("resid_post.6", positions="prompt" if where == "prompt" else "generated")
                next(session.generate(prompt, max_new_tokens=4, breakpoints=[points]))
            session.checkpoint().wait()
            found.append(
                {
                    "model": name,
                    "stopped": where,
                    "kv_mb": session.length * dj.engine.arena.bytes_per_position / 1e6,
                    "nbytes": session.checkpoint().nbytes,
                    "call_us": host_us(session.checkpoint),
                    "busy_call_us": host_us(session.checkpoint, busy=True),
                    "safe_us": host_us(session.checkpoint, safe=True),
                    **away(session),
                }
            )
    return found


def away(session: Any) -> Row:
    """Offload and return: calls, and until all is done."""
    engine = session.engine
    off: dict[str, list[float]] = {"offload": [], "return": []}
    done: dict[str, list[float]] = {"offload": [], "return": []}
    for _ in range(20):
        for name, act in (("offload", session.offload), ("return", lambda: engine.bring_back(session))):
            torch.cuda.synchronize()
            start = time.perf_counter()
            act()
            off[name].append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
            done[name].append((time.perf_counter() - start) * 1e6)
    calls = {f"{name}_call_us": statistics.median(times) for name, times in off.items()}
    return calls | {f"{name}_done_us": statistics.median(times) for name, times in done.items()}


def restores(name: str, dj: djinn.Dj, tokens: int) -> Row:
    """Restore from memory of a run stopped while decoding, to its stop."""
    prompt = (torch.arange(tokens) * 7 % 500 + 3).tolist()
    points = djinn.break_at("resid_post.6", positions="generated")
    with dj.session() as session:
        checkpoint = next(session.generate(prompt, max_new_tokens=4, breakpoints=[points])).checkpoint().wait()
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        restored = dj.restore(checkpoint)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
        restored.close()
    return {"model": name, "restore_us": statistics.median(times)}


def moved(staging: int) -> list[Row]:
    """KV rows of many sizes to the host and back, against one copy of as many contiguous bytes."""
    found = []
    for size in (4, 16, 64, 128, 256):
        specs = [KVSpec(8, 128, 128)] * 32
        length = size * MIB // (32 * 2 * 8 * 128 * DTYPE.itemsize)
        arena = KVArena(specs, 1, length + 7, DTYPE, torch.device(DEVICE))
        for tensor in arena.env.values():
            tensor.normal_()
        pool = HostPool(4 << 30, pinned=True)
        transfer = Transfer(arena, pool, staging)
        flat = torch.randn(size * MIB // 4, device=DEVICE)
        block = pool.take(flat.nbytes)
        host = block.tensor.view(torch.float32)
        parked = transfer.send(0, length).parked
        assert parked is not None
        row: Row = {"mib": size, "staging_mib": staging // MIB}
        actions: dict[str, Callable[[], object]] = {
            "to_host": partial(transfer.send, 0, length),
            "to_device": partial(transfer.receive, parked, 0),
            "contiguous_to_host": partial(host.copy_, flat, non_blocking=True),
            "contiguous_to_device": partial(flat.copy_, host, non_blocking=True),
        }
        for name, action in actions.items():
            done, device = synchronized_us(action), device_us(action)
            row |= {f"{name}_us": done, f"{name}_gbs": size * MIB / done / 1e3}
            row |= {f"{name}_device_us": device, f"{name}_device_gbs": size * MIB / device / 1e3}
            row[f"{name}_call_us"] = host_us(action, repeats=20)
        if size <= 64:
            layers = list(arena.env.values())
            parts = [torch.empty_like(t[0, :, :length], device="cpu", pin_memory=True) for t in layers]

            def one_by_one(layers: Any = layers, parts: Any = parts, length: int = length) -> None:
                for part, tensor in zip(parts, layers, strict=True):
                    part.copy_(tensor[0, :, :length], non_blocking=True)

            row["one_by_one_to_host_us"] = synchronized_us(one_by_one)
        found.append(row)
    return found


def synchronized_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds from the call until the device is idle again."""
    found: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        kept = call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e6)
        del kept
    return statistics.median(found)


def activation() -> Row:
    """2.5 MB from pinned memory to the device."""
    pool = HostPool(1 << 28, pinned=True)
    host = pool.take(2_500_000).tensor
    device = torch.empty(2_500_000, dtype=torch.uint8, device=DEVICE)
    return {
        "bytes": 2_500_000,
        "back_us": synchronized_us(lambda: device.copy_(host, non_blocking=True), 100),
        "to_new_tensor_us": synchronized_us(lambda: host.to(DEVICE, non_blocking=True), 100),
    }


def forks(dj: djinn.Dj, tokens: int) -> Row:
    """A fork of many tokens: the copy of the row, and the whole call."""
    arena = dj.engine.arena
    layers = list(arena.env.values())
    sources, targets = ([tensor[row, :, :tokens] for tensor in layers] for row in (0, 1))
    nbytes = tokens * arena.bytes_per_position
    flat = torch.empty(2, nbytes, dtype=torch.uint8, device=DEVICE)

    def loop() -> None:
        for tensor in layers:
            tensor[1, :, :tokens].copy_(tensor[0, :, :tokens])

    row: Row = {"tokens": tokens, "bytes": nbytes}
    for name, call in {
        "copy": lambda: arena.copy(0, [1], tokens),
        "loop": loop,
        "foreach": lambda: torch._foreach_copy_(targets, sources),
        "contiguous": lambda: flat[1].copy_(flat[0]),
    }.items():
        row |= {f"{name}_us": device_us(call), f"{name}_done_us": synchronized_us(call)}
    zeroed = [tensor[1] for tensor in layers]
    row["clear_us"], row["clear_call_us"] = (
        device_us(lambda: arena.packer.clear(1)),
        host_us(lambda: arena.packer.clear(1)),
    )
    row["foreach_zero_us"] = device_us(lambda: torch._foreach_zero_(zeroed))
    prompt = (torch.arange(tokens) * 7 % 500 + 3).tolist()
    with dj.session() as session:
        point = djinn.break_at("resid_post.6", positions="generated")
        stop = next(session.generate(prompt, max_new_tokens=4, breakpoints=[point]))
        for kind in ("fork_call_us", "fork_done_us"):
            times = []
            for _ in range(20):
                torch.cuda.synchronize()
                start = time.perf_counter()
                (twin,) = stop.fork()
                if kind == "fork_done_us":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e6)
                twin.session.close()
            row[kind] = statistics.median(times)
    return row


def cycles(dj: djinn.Dj, count: int = 1000) -> Row:
    """Memory before and after many checkpoints that are taken and dropped."""

    def now() -> dict[str, int]:
        torch.cuda.synchronize()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = dj.memory()
        return {
            "device": torch.cuda.memory_allocated(),
            "rss": 4096 * pages,
            "pinned_used": memory["pinned_used"],
            "pinned_capacity": memory["pinned_capacity"],
        }

    with dj.session() as session:
        stop = next(session.generate(list(range(3, 515)), max_new_tokens=4, breakpoints=["resid_post.6"]))
        for _ in range(50):
            stop.checkpoint()
        before = now()
        for index in range(count):
            checkpoint = stop.checkpoint()
            if index % 10 == 0:
                checkpoint.wait()
        del checkpoint
        after = now()
    return {"cycles": count} | {key: {"before": before[key], "after": after[key]} for key in before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    out = parser.parse_args().out
    torch.manual_seed(0)
    result: Row = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": str(DTYPE)}
    small = compiled(gpt2(), max_length=1024)
    result["calls"] = calls("gpt2", small, 512)
    result["restore"] = [restores("gpt2", small, 512)]
    result["cycles"] = cycles(small)
    small.close()
    large = compiled(thin_8b(), max_length=1280)
    result["calls"] += calls("llama-8b KV", large, 1024)
    result["restore"].append(restores("llama-8b KV", large, 1024))
    result["fork"] = forks(large, 1024)
    large.close()
    del small, large
    result["moved"] = moved(32 * MIB) + moved(64 * MIB)
    result["activation"] = activation()
    for part, rows in result.items():
        for row in rows if isinstance(rows, list) else [rows]:
            shown = row.items() if isinstance(row, dict) else [("", row)]
            print(part, "  ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in shown))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
