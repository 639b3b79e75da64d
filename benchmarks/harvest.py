"""Harvesting activations of many texts: ours against Hugging Face's eager model with forward hooks.

    python -m benchmarks.harvest --out DIR [--model llama-8b-shape] [--quick]

Every arm takes the same batches of random tokens and brings the same blocks' outputs to the host. ``hooks`` is the
loop that most people write; ``hooks, ended`` leaves the forward pass by an exception behind the last wanted block, as
ours does. No arm computes more than one position's logits. A sample is one batch; arms take turns in rotating order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock, harvest_report
from djinn_fx.benchmarks.answers import distance, tolerance
from djinn_fx.benchmarks.context import Context, refused
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Check, Json
from djinn_fx.benchmarks.registry import Benchmark, main
from djinn_fx.benchmarks.stats import overhead, rotated, summary

#: Rounds that are taken even if the budget is spent.
FEWEST = 4

#: Prompts at which the model's noise is measured.
NOISE_ROWS = 4

#: Weights beyond this many bytes get smaller batches.
LARGE = 4 << 30

#: Activations of one batch by layer, on the host: ``[rows, length, hidden]``.
Values = dict[int, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        rows: texts of a batch.
        length: tokens of each.
        rounds: batches that each arm is timed with.
    """

    rows: int
    length: int
    rounds: int


def sizes_of(context: Context, loaded: Loaded) -> Sizes:
    """Sizes for this device and this model."""
    if context.device.type != "cuda":
        return Sizes(8, min(128, loaded.room), context.size(24, 6))
    rows = 16 if loaded.weight_bytes > LARGE else 64
    return Sizes(rows, min(512, loaded.room), context.size(60, 12))


def layers_of(loaded: Loaded) -> dict[str, tuple[int, ...]]:
    """The layers of each case."""
    middle = loaded.layers // 2
    return {
        "two layers, the last of them the middle one": (middle // 2, middle),
        "every layer": tuple(range(loaded.layers)),
    }


def run(context: Context) -> dict[str, Json]:
    """Measure each case."""
    loaded = context.load()
    sizes = sizes_of(context, loaded)
    prompts = loaded.prompts(sizes.rows, sizes.length, context.options.seed)
    allowed = tolerance(loaded, prompts[:NOISE_ROWS])
    clock.clear(context.device)
    # What `verify` would compare is compared below, at the sizes that are measured.
    dj = context.compile(
        loaded, max_sessions=1, max_length=sizes.length, prefill_chunk=sizes.length, edit_rank=1, verify=False
    )
    found: dict[str, Json] = {"sizes": vars(sizes), "tolerance": allowed, "cases": {}}
    try:
        for name, layers in layers_of(loaded).items():
            case = Case(context, loaded, dj, sizes, layers, allowed)
            found["cases"][name] = context.part(name, case.run)
    finally:
        dj.close()
    return found


class Case:
    """One choice of layers: what is right, then how fast it comes."""

    def __init__(
        self,
        context: Context,
        loaded: Loaded,
        dj: djinn.Dj,
        sizes: Sizes,
        layers: tuple[int, ...],
        allowed: float,
    ) -> None:
        self.context, self.loaded, self.dj = context, loaded, dj
        self.sizes, self.layers, self.allowed = sizes, layers, allowed

    def run(self) -> dict[str, Json]:
        """The arms' figures, ours only if its values are right."""
        arms: dict[str, Callable[[torch.Tensor], Values]] = {
            "djinn_fx": partial(ours, self.dj, self.layers),
            "hooks": partial(hooks, self.loaded, self.layers, False),
            "hooks, ended": partial(hooks, self.loaded, self.layers, True),
        }
        prompts = self._prompts(0)
        right = arms["hooks"](prompts)
        checks = {name: self._check(name, arm(prompts), right) for name, arm in arms.items()}
        samples = self._samples({name: arm for name, arm in arms.items() if checks[name].held})
        cells = {name: self._cell(samples, name, check) for name, check in checks.items()}
        return {"layers": list(self.layers), "arms": cells}

    def _prompts(self, turn: int) -> torch.Tensor:
        return self.loaded.prompts(self.sizes.rows, self.sizes.length, self.context.options.seed + turn)

    def _check(self, name: str, found: Values, right: Values) -> Check:
        """An arm's values against those of the hooks, layer by layer."""
        what = f"{name} = hooks, {len(self.layers)} layers"
        if {layer: value.shape for layer, value in found.items()} != {k: v.shape for k, v in right.items()}:
            return self.context.check(what, False, "other layers or shapes")
        worst = max(distance(found[layer], right[layer]) for layer in self.layers)
        held = worst <= self.allowed
        return self.context.check(what, held, f"values within {worst:.1e}, tolerance {self.allowed:.1e}")

    def _samples(self, arms: Mapping[str, Callable[[torch.Tensor], Values]]) -> dict[str, list[float]]:
        """Milliseconds per batch, new texts in each round, arms in rotating order; one round is not counted."""
        found: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(self.sizes.rounds + 1):
            prompts = self._prompts(turn)
            for name in rotated(list(arms), turn):
                taken = clock.seconds(self.context.device, partial(arms[name], prompts))
                if turn:
                    found[name].append(1e3 * taken)
            if self.context.over and turn >= FEWEST:
                self.context.say(f"the budget is spent: {turn} of {self.sizes.rounds} rounds")
                break
        return found

    def _cell(self, samples: dict[str, list[float]], name: str, check: Check) -> dict[str, Json]:
        """An arm's summary, its tokens per second and its time over that of the hooks."""
        if not check.held:
            return refused(check)
        cell = summary(samples[name], "ms")
        against = {
            f"against_{key}": overhead(samples[base], samples[name], seed=self.context.options.seed)
            for key, base in (("hooks", "hooks"), ("ended", "hooks, ended"))
            if base in samples
        }
        tokens = self.sizes.rows * self.sizes.length
        return {**cell, "tokens_per_second": 1e3 * tokens / cell["median"], **against}


def ours(dj: djinn.Dj, layers: tuple[int, ...], tokens: torch.Tensor) -> Values:
    """The layers' outputs by ``run_with_cache``, nothing computed behind the last."""
    sites = [f"resid_post.{layer}" for layer in layers]
    _, cache = dj.run_with_cache(tokens, sites, stop_after=sites[-1], logits=False, device="cpu")
    return {layer: cache[site] for layer, site in zip(layers, sites, strict=True)}


class _Ended(Exception):
    """Leaves a forward pass."""


def hooks(loaded: Loaded, layers: tuple[int, ...], ends: bool, tokens: torch.Tensor) -> Values:
    """The layers' outputs by forward hooks on the blocks; ``ends`` leaves the pass behind the last of them."""
    found: Values = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: Any) -> None:
            found[layer] = (output[0] if isinstance(output, tuple) else output).to("cpu", copy=True)
            if ends and layer == layers[-1]:
                raise _Ended

        return hook

    handles = [loaded.block(layer).register_forward_hook(keep(layer)) for layer in layers]
    try:
        loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    except _Ended:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


BENCHMARK = Benchmark(
    name="harvest",
    run=run,
    tables=harvest_report.tables,
    pictures=harvest_report.pictures,
)

if __name__ == "__main__":
    sys.exit(main("harvest"))
