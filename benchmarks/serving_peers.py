"""Serving a crowd with Hugging Face's own loop: one turn at a time, the KV of the others in host memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from djinn_fx.benchmarks.crowd import Crowd
from djinn_fx.benchmarks.serving import Bench


class Offloaded:
    """Transformers' offloaded cache, one an agent: every layer comes ahead of its turn and goes back after it.

    That happens in every step; between turns nothing is left to do.
    """

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Why it cannot run here, or None."""
        return None if device.type == "cuda" else "transformers' offloaded cache needs CUDA streams"

    def __init__(self, bench: Bench, agents: int, rows: int, hints: bool) -> None:
        self.bench, self.sizes, self.model = bench, bench.sizes, bench.loaded.model
        self.device = bench.loaded.device
        self.caches: list[Any] = [self.cache() for _ in range(agents)]
        self.last: list[list[int]] = [list(bench.prompts[agent]) for agent in range(agents)]
        self.openings: dict[int, list[int]] = {}
        for agent in range(agents):
            self.openings[agent] = []
            self.turn(agent, self.openings[agent].append)

    def cache(self) -> Any:
        """A cache for an agent."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config, offloading=True)

    def serve(self, crowd: Crowd) -> None:
        """Serve until the crowd is over, first come, first served."""
        crowd.open()
        while not crowd.over:
            found = crowd.arrived(1)
            if not found:
                crowd.wait()
            for visit in found:
                self.turn(visit.turn.agent, partial(crowd.hear, visit))
                crowd.done(visit)

    def turn(self, agent: int, hear: Callable[[int], object]) -> None:
        """One turn; ``hear`` is called with each token."""
        self.fetch(self.caches[agent])
        tokens = self.last[agent]
        for _ in range(self.sizes.new):
            out = self.model(
                torch.tensor([tokens], device=self.device),
                past_key_values=self.caches[agent],
                use_cache=True,
                logits_to_keep=1,
            )
            tokens = [int(out.logits[0, -1].argmax())]
            hear(tokens[0])
        self.last[agent] = tokens
        self.put_away(self.caches[agent])

    def fetch(self, cache: Any) -> None:
        """Before a turn."""

    def put_away(self, cache: Any) -> None:
        """After a turn."""

    def close(self) -> None:
        """Drop the caches."""
        self.caches = []


class PerLayer(Offloaded):
    """The same loop over transformers' plain cache, which is moved here, a layer at a time and once a turn.

    After a turn keys and values of each layer are copied to pinned memory, and back before the next.
    """

    @staticmethod
    def unsupported(device: torch.device) -> str | None:
        """Always possible."""
        return None

    def cache(self) -> Any:
        """A cache for an agent."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def fetch(self, cache: Any) -> None:
        """Every layer back to the device."""
        for layer in cache.layers:
            if layer.is_initialized:
                layer.keys = layer.keys.to(self.device, non_blocking=True)
                layer.values = layer.values.to(self.device, non_blocking=True)

    def put_away(self, cache: Any) -> None:
        """Every layer to the host."""
        for layer in cache.layers:
            layer.keys, layer.values = _host(layer.keys), _host(layer.values)


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned for a GPU."""
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
