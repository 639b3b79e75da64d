"""PyTorch eager: Hugging Face's own forward with forward hooks on the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from djinn_fx.benchmarks.answers import Work
from djinn_fx.benchmarks.decoder import BLOCKS, Decoder
from djinn_fx.benchmarks.models import Loaded


def register(loaded: Loaded, work: Work, keep: Callable[[int, torch.Tensor], object] | None = None) -> list[Any]:
    """Forward hooks that do a work on the blocks' outputs; returns their handles.

    Args:
        loaded: the model.
        work: what to do.
        keep: given the layer and the value where ``work`` reads one.
    """
    handles = []
    for layer in sorted({*work.scale, *work.ablate, *work.read}):
        handles.append(loaded.block(layer).register_forward_hook(_hook(layer, work, keep)))
    return handles


def _hook(layer: int, work: Work, keep: Callable[[int, torch.Tensor], object] | None) -> Callable[..., Any]:
    def hook(module: object, inputs: object, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        value = apply(value, layer, work)
        if keep is not None and layer in work.read:
            keep(layer, value)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    return hook


def apply(value: torch.Tensor, layer: int, work: Work) -> torch.Tensor:
    """A work's edits of one layer."""
    if layer in work.scale:
        value = value * work.scale[layer]
    if layer in work.ablate:
        directions = work.ablate[layer].to(value)
        value = value - (value @ directions.T) @ directions
    return value


class HooksDecoder(Decoder):
    """Eager decoding with a cache that grows."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        self.handles: list[Any] = []
        self.cache: Any = None
        self.seen: dict[int, torch.Tensor] = {}

    def first(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Take the prompts with the work's hooks in place."""
        from transformers import DynamicCache

        self.close()
        self.handles = register(self.loaded, work, self._keep)
        self.cache = DynamicCache(config=self.loaded.model.config)
        return self._run(prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token of each row."""
        return self._run(tokens)

    def forward(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Whole prompts without a cache."""
        self.close()
        self.handles = register(self.loaded, work, self._keep)
        logits: torch.Tensor = self.loaded.model(input_ids=prompts, use_cache=False).logits
        return logits

    def close(self) -> None:
        """Remove the hooks and the cache."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.cache = [], None

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.loaded.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _keep(self, layer: int, value: torch.Tensor) -> None:
        self.seen[layer] = value.to("cpu")


class HooksPeer:
    """PyTorch eager with forward hooks."""

    name = "PyTorch eager + forward hooks"
    last = False
    compiles = False
    expected_wrong = False
    no_forward = None

    def available(self, loaded: Loaded) -> str | None:
        """Always."""
        return None

    def refusal(self, work: Work) -> str | None:
        """Nothing that a hook could not do."""
        return None

    def no_pause(self) -> str:
        """It blocks."""
        return BLOCKS

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """A decoder over the model itself."""
        return HooksDecoder(loaded)


PEERS = (HooksPeer(),)
