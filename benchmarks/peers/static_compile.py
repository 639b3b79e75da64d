"""Hugging Face StaticCache with ``torch.compile``: hooks registered before compiling, and after."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from djinn_fx.benchmarks.answers import Work
from djinn_fx.benchmarks.decoder import BLOCKS, Decoder
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.peers.hooks import register

#: What fails to be traced when a hook copies to the host; found by asking, see :meth:`StaticPeer.refusal`.
READS = "a hook that hands a value to the caller on the host is a graph break, which fullgraph=True refuses"

#: Steps after which nothing is compiled any more.
SETTLED = 4


class StaticDecoder(Decoder):
    """A prompt in eager mode, then steps of one token through the compiled forward over a static cache."""

    def __init__(self, loaded: Loaded, room: int, late: bool) -> None:
        super().__init__(loaded)
        self.room, self.late = room, late
        self.handles: list[Any] = []
        self.cache: Any = None
        self.position = torch.zeros(1, 1, dtype=torch.int64, device=loaded.device)
        self.compiled: Any = None
        self.done: tuple[int, Work] | None = None

    def first(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Compile with the hooks in place (or before they are), and take the prompts.

        Prompts of the same shape under the same work take what was compiled before.
        """
        from transformers import StaticCache

        if self.done == (len(prompts), work):
            self.cache.reset()
            return self._prompt(prompts)
        self.close()
        plain = Work("plain")
        self.cache = StaticCache(config=self.loaded.model.config, max_cache_len=self.room)
        if self.late:
            self._compile()
            self.last = self._prompt(prompts)
            self.block(SETTLED)  # compiled here, before any hook
            self.cache.reset()
        self.handles = register(self.loaded, plain if not work.edits else work)
        logits = self._prompt(prompts)
        if not self.late:
            self._compile()
        self.done = (len(prompts), work)
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token of each row through the compiled forward."""
        if self.loaded.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = self.compiled(tokens, self.position, self.cache)
        self.position += 1
        return logits.clone()

    def forward(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Whole prompts through a compilation of their own, made when a work is new."""
        if self.done != (-1, work):
            self.close()
            model = self.loaded.model
            if not self.late:
                self.handles = register(self.loaded, work)

            def whole(ids: torch.Tensor) -> Any:
                return model(input_ids=ids, use_cache=False).logits

            self.compiled = torch.compile(whole, fullgraph=True)
            self.compiled(prompts)
            if self.late:
                self.handles = register(self.loaded, work)
            self.done = (-1, work)
        logits: torch.Tensor = self.compiled(prompts)
        return logits

    def close(self) -> None:
        """Remove the hooks and forget what was compiled."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.cache, self.compiled, self.done = [], None, None, None
        torch._dynamo.reset()

    def _prompt(self, prompts: torch.Tensor) -> torch.Tensor:
        places = torch.arange(prompts.shape[1], device=prompts.device)[None]
        out = self.loaded.model(
            input_ids=prompts, position_ids=places, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.position = torch.full_like(self.position, prompts.shape[1])
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _compile(self) -> None:
        model = self.loaded.model

        def one(tokens: torch.Tensor, position: torch.Tensor, cache: Any) -> Any:
            return model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]

        mode = "reduce-overhead" if self.loaded.device.type == "cuda" else "default"
        self.compiled = torch.compile(one, mode=mode, fullgraph=True)


class StaticPeer:
    """StaticCache and torch.compile, with hooks registered before or after compiling."""

    last = False
    compiles = True
    no_forward = None

    def __init__(self, late: bool) -> None:
        self.late = self.expected_wrong = late
        self.name = f"StaticCache + torch.compile, hooks {'after' if late else 'before'} compiling"

    def available(self, loaded: Loaded) -> str | None:
        """Inductor needs a compiler of C++ on the CPU and Triton on CUDA."""
        if loaded.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
            return "Inductor needs a C++ compiler on the CPU, and there is none"
        return None

    def refusal(self, work: Work) -> str | None:
        """Values cannot leave a graph that is compiled whole; what needs no hook is measured once."""
        if self.late and not work.edits and not work.read:
            return "without hooks it is the row of hooks before compiling"
        return READS if work.read else None

    def no_pause(self) -> str:
        """It blocks."""
        return BLOCKS

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """A decoder that compiles at its first step."""
        return StaticDecoder(loaded, room, self.late)


PEERS = (StaticPeer(False), StaticPeer(True))
