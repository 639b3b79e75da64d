"""Checkpoints and forks at a stop: how soon the call returns, how soon all is done; and one activation coming back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import same_bits
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import summary

#: Lengths of sessions on CUDA: each ends in a chunk that is padded to the largest size, so that one program serves all.
LENGTHS = (288, 512, 800, 1008)

#: Bytes of the original system's checkpoint, one activation.
ACTIVATION = 2_500_000

#: Tokens that the original and its fork go on with.
FURTHER = 4


def at_stop(context: Context, loaded: Loaded, dj: djinn.Dj, prompt: list[int]) -> dict[str, Json]:
    """``checkpoint()`` of a session that stands at a middle layer of its prompt, the frame's activations included."""
    site = f"resid_post.{loaded.layers // 2}"
    with dj.session() as session:
        run = session.generate(prompt, max_new_tokens=1, breakpoints=[site])
        stop = next(run)
        dispatch, whole = _both(context, session.checkpoint, lambda taken: taken.wait())
        taken = session.checkpoint().wait()
        value, nbytes = stop.value.clone(), taken.nbytes
        kv = session.length * dj.engine.arena.bytes_per_position
        run.close()
    with dj.restore(taken) as restored:
        held = restored.run is not None and restored.run.stop is not None
        held = held and same_bits(restored.run.stop.value, value)  # type: ignore[union-attr]
    check = context.check("a checkpoint at a stop of the prompt comes back with the same bits", held)
    if not check.held:
        return refused(check)
    frame = {"tokens": len(prompt), "layer": loaded.layers // 2, "bytes": nbytes, "activation_bytes": value.nbytes}
    found = {**frame, "dispatch": summary(dispatch, "ms"), "whole": summary(whole, "ms")}
    return {**found, "driver_calls": summary(bare_calls(context, value, kv), "ms")} if value.is_cuda else found


def goes_on(dj: djinn.Dj, session: djinn.Session, taken: djinn.Checkpoint) -> bool:
    """Whether a session restored from a checkpoint gives the next logits that its original gives, bit for bit."""
    with dj.restore(taken) as restored:
        ours, right = (
            one.generate(None, max_new_tokens=1, output_logits=True).result().logits for one in (restored, session)
        )
    assert ours is not None and right is not None
    return same_bits(ours, right)


def bare_calls(context: Context, value: torch.Tensor, kv: int) -> list[float]:
    """Milliseconds of the driver calls alone that such a checkpoint is made of, without anything around them.

    The copy stream waits for the compute stream, packs KV and value with one launch, notes that the KV may change,
    copies once, and notes that all is there; without KV it copies the value as it is. Nobody has looked at the stop.

    Args:
        context: of the run.
        value: the stop's.
        kv: bytes of the session's KV.
    """
    side, begun, before = torch.cuda.Stream(value.device), torch.cuda.Event(), torch.cuda.current_stream(value.device)
    source = torch.empty(kv + value.nbytes, dtype=torch.uint8, device=value.device)
    host, staging = torch.empty_like(source, device="cpu").pin_memory(), torch.empty_like(source)

    def calls() -> None:
        begun.record(before)
        begun.wait(side)
        torch.cuda.set_stream(side)
        if kv:
            staging.copy_(source)
            torch.cuda.Event().record(side)
        host.copy_(staging, non_blocking=True)
        torch.cuda.Event().record(side)
        torch.cuda.set_stream(before)

    return [1e3 * clock.dispatch_seconds(value.device, calls) for _ in range(context.size(30, 3) + 2)][2:]


def activation_back(context: Context) -> dict[str, Json]:
    """As many bytes as the original's one activation, from pinned memory to the device."""
    device = context.device
    host = torch.randint(0, 255, (ACTIVATION,), dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(ACTIVATION, dtype=torch.uint8, device=device)
    repeats = context.size(50, 5)

    def back() -> None:
        target.copy_(host, non_blocking=True)

    samples = [1e3 * clock.seconds(device, back) for _ in range(repeats + 2)][2:]
    check = context.check("the activation came back bit for bit", same_bits(target, host))
    return {"bytes": ACTIVATION, "back": context.speed(check, lambda: samples)}


def forks(context: Context, loaded: Loaded, dj: djinn.Dj, room: int) -> list[dict[str, Json]]:
    """``stop.fork(1)`` while decoding, by the number of positions that the fork takes over."""
    most = room - FURTHER
    lengths = (512, 1024) if context.device.type == "cuda" else (16, 32)
    found = []
    for length in dict.fromkeys(min(length, most) for length in lengths):
        prompt = loaded.prompts(1, length - 1, context.options.seed + length)[0].tolist()
        found.append(_fork(context, loaded, dj, prompt))
    return found


def _fork(context: Context, loaded: Loaded, dj: djinn.Dj, prompt: list[int]) -> dict[str, Json]:
    point = djinn.break_at(f"resid_post.{loaded.layers // 2}", positions="generated", times=1)
    with dj.session() as session:
        run = session.generate(prompt, max_new_tokens=FURTHER, breakpoints=[point])
        stop = next(run)
        positions = session.extent
        dispatch, whole = _both(
            context, stop.fork, lambda made: clock.synchronize(context.device), lambda made: made[0].session.close()
        )
        (twin,) = stop.fork()
        first, second = (result.tokens for result in dj.results([run, twin.run]))
    check = context.check(f"a fork of {positions} positions goes on with the same tokens", torch.equal(first, second))
    if not check.held:
        return {"tokens": positions, "dispatch": refused(check), "whole": refused(check)}
    nbytes = positions * dj.engine.arena.bytes_per_position
    return {"tokens": positions, "bytes": nbytes, "dispatch": summary(dispatch, "ms"), "whole": summary(whole, "ms")}


def _both(
    context: Context,
    call: Callable[[], Any],
    finish: Callable[[Any], object],
    drop: Callable[[Any], object] = lambda made: None,
) -> tuple[list[float], list[float]]:
    """Milliseconds until a call returns, the device idle before it, and until what it began is done."""
    dispatch, whole = [], []
    for _ in range(context.size(30, 3) + 2):
        clock.synchronize(context.device)
        start = time.perf_counter()
        made = call()
        dispatch.append(1e3 * (time.perf_counter() - start))
        finish(made)
        whole.append(1e3 * (time.perf_counter() - start))
        drop(made)
    return dispatch[2:], whole[2:]
