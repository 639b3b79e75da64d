"""A model larger than the device memory given to its weights: ours against Accelerate, on the same budgets.

    python -m benchmarks.virtual --out DIR [--model llama-8b-shape] [--quick]

First everything is resident; its answers are the right ones. Then the weights move to the host, and for each budget
the layers that do not fit stream. The floor of a step is the bytes that stream over the bandwidth of one large
contiguous copy from pinned memory, measured in the same run. Accelerate runs last: it changes the model it is given.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from djinn_fx.benchmarks import clock, virtual_report
from djinn_fx.benchmarks.answers import Answer, Work, judge, same_bits, tolerance
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.decode import LARGE
from djinn_fx.benchmarks.decoder import Decoder
from djinn_fx.benchmarks.environment import version_of
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.ours import OurDecoder
from djinn_fx.benchmarks.peers.hooks import HooksDecoder
from djinn_fx.benchmarks.record import Check, Json
from djinn_fx.benchmarks.registry import Benchmark, main

PLAIN = Work("plain")

#: Tokens whose logits are compared.
COMPARED = 5

#: Budgets as shares of the weights' bytes, and of a large model in bytes.
SHARES, LARGE_BUDGETS = (0.6, 0.8), (4 << 30, 8 << 30, 12 << 30)

#: Bytes of the copy that tells the bus's bandwidth; that of a layer of an 8B model.
COPIED = 416 << 20


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        prompt: tokens of the prompt.
        prompts: samples of it.
        block: tokens per sample of decoding.
        blocks: samples of decoding.
        peer_blocks: those of Accelerate.
    """

    prompt: int
    prompts: int
    block: int
    blocks: int
    peer_blocks: int

    @property
    def room(self) -> int:
        """Positions that a session needs."""
        return self.prompt + self.block * (max(self.blocks, self.peer_blocks) + 1) + 16


def plan_of(context: Context, loaded: Loaded) -> Plan:
    """Sizes for this device and this model."""
    if context.device.type != "cuda":
        return Plan(min(32, loaded.room // 4), 3, 4, context.size(5, 2), 2)
    if loaded.weight_bytes > LARGE:
        return Plan(min(512, loaded.room // 2), context.size(5, 3), 8, context.size(6, 3), 1)
    return Plan(min(512, loaded.room // 2), context.size(20, 5), 16, context.size(12, 4), 2)


def budgets_of(loaded: Loaded) -> tuple[int, ...]:
    """Device memory for weights, in bytes."""
    if loaded.weight_bytes > LARGE:
        return LARGE_BUDGETS
    return tuple(int(share * loaded.weight_bytes) for share in SHARES)


def bus_bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes per second of one contiguous copy from pinned memory to the device; the best of many."""
    cuda = device.type == "cuda"
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target.copy_(source)
    return nbytes / min(
        clock.device_seconds(device, lambda: target.copy_(source, non_blocking=True)) for _ in range(10)
    )


def run(context: Context) -> dict[str, Json]:
    """Measure resident, streaming, and Accelerate."""
    loaded = context.load()
    here = Virtual(context, loaded)
    budgets = budgets_of(loaded)
    bandwidth = bus_bandwidth(context.device, min(COPIED, loaded.weight_bytes))
    found: dict[str, Json] = {
        "plan": vars(here.plan),
        "weight_bytes": loaded.weight_bytes,
        "bus_bytes_per_second": bandwidth,
        "resident": context.part("resident", here.resident),
        "budgets": {},
    }
    if here.right is None:
        return found
    loaded.model.to("cpu")
    clock.clear(context.device)
    for budget in budgets:
        found["budgets"][str(budget)] = {
            "ours": context.part(f"ours, {budget >> 20} MiB", partial(here.ours, budget, bandwidth))
        }
    for index, budget in enumerate(budgets):
        found["budgets"][str(budget)]["accelerate"] = here.theirs(budget, first=index == 0)
    return found


class Virtual:
    """One model on different budgets."""

    def __init__(self, context: Context, loaded: Loaded) -> None:
        self.context, self.loaded, self.plan = context, loaded, plan_of(context, loaded)
        self.prompts = loaded.prompts(1, self.plan.prompt, context.options.seed)
        self.right: Answer | None = None
        self.allowed = tolerance(loaded, self.prompts)

    def resident(self) -> dict[str, Json]:
        """Everything on the device; its answer is what the others are compared with."""
        eager = HooksDecoder(self.loaded)
        reference = eager.answer(self.prompts, PLAIN, COMPARED)
        eager.close()
        dj = self._compile()
        try:
            answer = OurDecoder(self.loaded, dj).answer(self.prompts, PLAIN, COMPARED)
            verdict = judge(reference, answer, self.allowed)
            check = self.context.check("resident = the eager model", verdict.held, verdict.detail)
            if not check.held:
                return refused(check)
            self.right = answer
            return {**self._speeds(dj, check), "weights": dj.memory()["weights"]}
        finally:
            dj.close()

    def ours(self, budget: int, bandwidth: float) -> dict[str, Json]:
        """Layers that do not fit stream."""
        dj = self._compile(device=self.context.device, weights_bytes=budget)
        try:
            assert self.right is not None and self.right.logits is not None
            answer = OurDecoder(self.loaded, dj).answer(self.prompts, PLAIN, COMPARED)
            assert answer.logits is not None
            same = same_bits(answer.logits, self.right.logits)
            check = self.context.check(f"{budget >> 20} MiB = resident, bit for bit", same)
            memory = dj.memory()
            floor = 1e3 * memory["weights_streamed"] / bandwidth
            found = self._speeds(dj, check)
            for what in ("prompt", "decode"):
                if "median" in found[what]:
                    found[what]["bus_share"] = floor / found[what]["median"]
            return {
                **found,
                "weights": memory["weights"],
                "streamed": memory["weights_streamed"],
                "floor_ms": floor,
            }
        finally:
            dj.close()

    def theirs(self, budget: int, *, first: bool) -> dict[str, Json]:
        """Accelerate's offload to the host under the same limit."""
        if not self.context.options.peers:
            return {"skipped": "--no-peers"}
        if self.context.device.type != "cuda":
            return {"unsupported": "Accelerate offloads from a CUDA device; there is none"}
        if version_of("accelerate") is None:
            return {"absent": "accelerate is not installed"}
        if not first:
            return {"skipped": "it has changed the model; it is measured at the first budget"}
        found: dict[str, Json] = self.context.part(f"accelerate, {budget >> 20} MiB", lambda: self._accelerate(budget))
        return found

    # -- how long it takes ---------------------------------------------------------------------

    def _compile(self, **options: Any) -> Any:
        sizes = {"max_sessions": 1, "max_length": min(self.plan.room, self.loaded.room), "verify": False}
        return self.context.compile(self.loaded, **sizes, **options)

    def _speeds(self, dj: Any, check: Check) -> dict[str, Json]:
        """Milliseconds of a prompt up to its first token, and of a token."""
        device, plan, ids = self.context.device, self.plan, self.prompts[0].tolist()

        def prompt() -> float:
            with dj.session() as session:
                return clock.seconds(device, lambda: session.generate(ids, max_new_tokens=1).run_to_end())

        decoder = OurDecoder(self.loaded, dj)
        decoder.start(self.prompts, PLAIN)
        decoder.block(plan.block)  # not counted
        try:
            decode = self.context.speed(check, lambda: _per_token(decoder.block_seconds, plan.block, plan.blocks))
        finally:
            decoder.close()
        prompt()
        return {
            "prompt": self.context.speed(check, lambda: [1e3 * prompt() for _ in range(plan.prompts)]),
            "decode": decode,
        }

    def _accelerate(self, budget: int) -> dict[str, Json]:
        device = self.context.device
        before = torch.cuda.memory_allocated(device)
        dispatch(self.loaded.model, budget, int(device.index))
        weights = torch.cuda.memory_allocated(device) - before
        decoder: Decoder = HooksDecoder(self.loaded)
        assert self.right is not None
        verdict = judge(self.right, decoder.answer(self.prompts, PLAIN, COMPARED), self.allowed)
        check = self.context.check("accelerate = resident", verdict.held, verdict.detail)
        count = min(self.plan.prompts, 3)
        prompts = self.context.speed(
            check,
            lambda: [1e3 * clock.seconds(device, lambda: decoder.start(self.prompts, PLAIN)) for _ in range(count)],
        )
        decode = self.context.speed(
            check, lambda: _per_token(decoder.block_seconds, min(self.plan.block, 4), self.plan.peer_blocks)
        )
        decoder.close()
        return {"prompt": prompts, "decode": decode, "weights": weights}


def dispatch(model: Any, budget: int, device: int) -> None:
    """Spread a model that lies on the CPU over a CUDA device and the host, as transformers does for ``device_map``.

    Args:
        model: changed in place: hooks bring what stays on the host when it is needed.
        budget: bytes of the device that its weights may take.
        device: index of the device.
    """
    accelerate: Any = importlib.import_module("accelerate")
    where = accelerate.infer_auto_device_map(
        model,
        max_memory={device: budget, "cpu": 1 << 50},
        # A list: anything else is taken for the name of one class, and blocks would be torn apart.
        no_split_module_classes=sorted(model._no_split_modules or ()),
    )
    skipped = sorted(getattr(model, "_skip_keys_device_placement", None) or ())  # such as the cache
    accelerate.dispatch_model(model, device_map=where, main_device=device, skip_keys=skipped)


def _per_token(block_seconds: Callable[[int], float], block: int, count: int) -> list[float]:
    """Milliseconds per token of some blocks."""
    return [1e3 * block_seconds(block) / block for _ in range(count)]


BENCHMARK = Benchmark(
    name="virtual",
    run=run,
    tables=virtual_report.tables,
    pictures=virtual_report.pictures,
)

if __name__ == "__main__":
    sys.exit(main("virtual"))
