"""TransformerLens: its bridge over the same module, with its hooks.

The bridge forces eager attention and rewires the module it is given, so it runs last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from djinn_fx.benchmarks.answers import Work
from djinn_fx.benchmarks.decoder import BLOCKS, Decoder
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.peers.hooks import apply
from djinn_fx.benchmarks.peers.roster import not_installed

#: Reference names that tell the bridge which architecture it is given; nothing is loaded from them.
KINDS = {"gpt2": "gpt2", "llama": "meta-llama/Llama-3.1-8B"}


class LensDecoder(Decoder):
    """Each forward through the bridge with hooks at ``blocks.N.hook_resid_post`` or what it calls a block's output."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        from transformer_lens.model_bridge import TransformerBridge

        from djinn_fx.bundled import storyteller

        kind = KINDS[loaded.model.config.model_type]
        self.bridge: Any = TransformerBridge.boot_transformers(
            kind,
            hf_model=loaded.model,
            tokenizer=storyteller()[1],
            device=str(loaded.device),
            dtype=next(loaded.model.parameters()).dtype,
        )
        self.cache: Any = None
        self.work = Work("plain")
        self.seen: dict[int, torch.Tensor] = {}

    def first(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Take the prompts with hooks in place."""
        from transformers import DynamicCache

        self.work, self.cache = work, DynamicCache(config=self.loaded.model.config)
        return self.step(prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token of each row."""
        return self._run(tokens, past_key_values=self.cache, use_cache=True)[:, -1]

    def forward(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Whole prompts."""
        self.work = work
        return self._run(prompts, use_cache=False)

    def _run(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        layers = sorted({*self.work.scale, *self.work.ablate, *self.work.read})
        hooks = [(f"blocks.{layer}.hook_out", self._hook(layer)) for layer in layers]
        with self.bridge.hooks(fwd_hooks=hooks):
            logits: torch.Tensor = self.bridge(tokens, return_type="logits", **options)
        return logits

    def _hook(self, layer: int) -> Callable[..., torch.Tensor]:
        def hook(value: torch.Tensor, hook: object = None) -> torch.Tensor:
            value = apply(value, layer, self.work)
            if layer in self.work.read:
                self.seen[layer] = value.to("cpu")
            return value

        return hook

    def close(self) -> None:
        """Drop the cache."""
        self.cache = None


class LensPeer:
    """TransformerLens's bridge."""

    name = "TransformerLens (TransformerBridge)"
    last = True
    compiles = False
    expected_wrong = False
    no_forward = None

    def available(self, loaded: Loaded) -> str | None:
        """If it is installed and knows the architecture."""
        kind = loaded.model.config.model_type
        if kind not in KINDS:
            return f"this module does not know how to name the architecture {kind!r} to it"
        return not_installed("transformer_lens", "pip install 'djinn-fx[peers]'")

    def refusal(self, work: Work) -> str | None:
        """Nothing that a hook could not do."""
        return None

    def no_pause(self) -> str:
        """It blocks."""
        return BLOCKS

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """A decoder over the bridge; the model is rewired from here on."""
        return LensDecoder(loaded)


PEERS = (LensPeer(),)
