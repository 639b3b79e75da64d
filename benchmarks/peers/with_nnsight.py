"""nnsight: a trace per step over the same module."""

from __future__ import annotations

from typing import Any

import torch

from djinn_fx.benchmarks.answers import Work
from djinn_fx.benchmarks.decoder import BLOCKS, Decoder
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.peers.hooks import apply
from djinn_fx.benchmarks.peers.roster import not_installed


class NNsightDecoder(Decoder):
    """Each forward in a trace; edits and reads are written into it."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded)
        from nnsight import NNsight

        self.wrapped: Any = NNsight(loaded.model)
        self.blocks: Any = self.wrapped
        for name in loaded.blocks.split("."):
            self.blocks = getattr(self.blocks, name)
        self.cache: Any = None
        self.work = Work("plain")
        self.seen: dict[int, torch.Tensor] = {}

    def first(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Take the prompts in a trace."""
        from transformers import DynamicCache

        self.work = work
        self.cache = DynamicCache(config=self.loaded.model.config)
        return self.step(prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token of each row in a trace."""
        logits = self._trace(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return logits[:, -1]

    def forward(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Whole prompts in a trace."""
        self.work = work
        return self._trace(input_ids=prompts, use_cache=False)

    def _trace(self, **inputs: Any) -> torch.Tensor:
        work, blocks, wrapped = self.work, self.blocks, self.wrapped
        touched = sorted({*work.scale, *work.ablate, *work.read})
        found: dict[int, Any] = {}
        with wrapped.trace(**inputs):
            for layer in touched:
                output = blocks[layer].output
                whole = isinstance(output, tuple)
                value: Any = apply(output[0] if whole else output, layer, work)
                if work.edits:
                    blocks[layer].output = (value, *output[1:]) if whole else value
                if layer in work.read:
                    found[layer] = value.save()
            logits = wrapped.output.logits.save()
        self.seen = {layer: value.to("cpu") for layer, value in found.items()}
        result: torch.Tensor = logits
        return result

    def close(self) -> None:
        """Drop the cache."""
        self.cache = None


class NNsightPeer:
    """nnsight over the same module."""

    name = "nnsight"
    last = False
    compiles = False
    expected_wrong = False
    no_forward = None

    def available(self, loaded: Loaded) -> str | None:
        """If it is installed."""
        return not_installed("nnsight", "pip install 'djinn-fx[peers]'")

    def refusal(self, work: Work) -> str | None:
        """Nothing that a trace could not do."""
        return None

    def no_pause(self) -> str:
        """It blocks."""
        return BLOCKS

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """A decoder over a wrapper of the model."""
        return NNsightDecoder(loaded)


PEERS = (NNsightPeer(),)
