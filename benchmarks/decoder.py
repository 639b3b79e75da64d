"""Decoders: what a system must do to be measured, ours and the peers' alike."""

from __future__ import annotations

from typing import Protocol

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Answer, Work
from djinn_fx.benchmarks.models import Loaded

#: Why hooks and traces cannot pause.
BLOCKS = "a hook or trace must return before its forward pass goes on; while it waits, so does the whole call"


class Decoder:
    """A greedy loop; a system fills in :meth:`first`, :meth:`step` and :meth:`forward`.

    The loop reads nothing on the host: a system that can run ahead of the host may.

    Attributes:
        loaded: the model.
        last: logits ``[rows, vocab]`` from which the next tokens are chosen.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.last = torch.empty(0)

    def first(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Take the prompts ``[rows, length]``; returns the logits at their ends."""
        raise NotImplementedError

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take one token of each row ``[rows, 1]``; returns the logits after it."""
        raise NotImplementedError

    def forward(self, prompts: torch.Tensor, work: Work) -> torch.Tensor:
        """Logits ``[rows, length, vocab]`` of whole prompts, without a cache."""
        raise NotImplementedError

    def start(self, prompts: torch.Tensor, work: Work) -> None:
        """Take the prompts, ready to decode."""
        self.last = self.first(prompts, work)

    def block(self, count: int) -> None:
        """Decode so many tokens in each row."""
        for _ in range(count):
            self.last = self.step(self.last.argmax(-1, keepdim=True))

    def block_seconds(self, count: int) -> float:
        """Seconds that :meth:`block` takes, host work included."""
        return clock.seconds(self.loaded.device, lambda: self.block(count))

    def answer(self, prompts: torch.Tensor, work: Work, count: int) -> Answer:
        """The greedy continuation, with its logits."""
        self.start(prompts, work)
        logits = [self.last.float().cpu()]
        for _ in range(count - 1):
            self.last = self.step(self.last.argmax(-1, keepdim=True))
            logits.append(self.last.float().cpu())
        stacked = torch.stack(logits, 1)
        return Answer(stacked.argmax(-1), stacked)

    def close(self) -> None:
        """Let go of hooks, caches and compiled code."""


class Peer(Protocol):
    """Another system.

    Attributes:
        name: in tables.
        last: whether it changes the model it is given, so that it must run last.
        compiles: whether every shape and every set of hooks takes it a compilation.
        expected_wrong: whether it is there to show that its edits do not act.
        no_forward: why it cannot be asked for one forward pass alone, or None.
    """

    name: str
    last: bool
    compiles: bool
    expected_wrong: bool
    no_forward: str | None

    def available(self, loaded: Loaded) -> str | None:
        """Why it cannot run here, or None."""

    def refusal(self, work: Work) -> str | None:
        """What of a work its API cannot do, or None."""

    def no_pause(self) -> str:
        """Why it cannot serve another request while one stands in the middle of its forward pass."""

    def open(self, loaded: Loaded, room: int) -> Decoder:
        """Make it ready for sequences of at most ``room`` positions."""
