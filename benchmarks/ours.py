"""djinn_fx as a decoder: the same work as the peers do, through the public API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Answer, Work
from djinn_fx.benchmarks.models import Loaded

#: Ways to stop a row at every token.
STOPS = ("untouched", "edited")


def edits_of(work: Work) -> list[djinn.Edit]:
    """A work as Edits."""
    scales = [djinn.Edit(f"resid_post.{layer}", scale=factor) for layer, factor in work.scale.items()]
    return scales + [djinn.Edit(f"resid_post.{layer}", ablate=rows) for layer, rows in work.ablate.items()]


def own(work: Work, row: int) -> Work:
    """A work with factors of a row's own."""
    return replace(work, scale={layer: factor - 0.0005 * row for layer, factor in work.scale.items()})


class OurDecoder:
    """Sessions of one compiled model, a row each, that decode together.

    Attributes:
        loaded: the model.
        dj: compiled.
        capture: sites whose values each block captures.
        breakpoints: of the first row; the others run through.
        touch: factor that each stop applies to its value, or None.
        varied: whether each row has an edit of its own, see :func:`own`.
        sessions: open ones.
    """

    def __init__(self, loaded: Loaded, dj: Any) -> None:
        self.loaded, self.dj = loaded, dj
        self.capture: tuple[str, ...] = ()
        self.breakpoints: tuple[Any, ...] = ()
        self.touch: float | None = None
        self.varied = False
        self.sessions: list[Any] = []
        self.stops = 0

    def start(self, prompts: torch.Tensor, work: Work) -> None:
        """Open the sessions and take the prompts; the first token of each is then drawn."""
        self.close()
        self._open(len(prompts), work)
        for session, row in zip(self.sessions, prompts.tolist(), strict=True):
            session.generate(row, max_new_tokens=1).run_to_end()

    def block(self, count: int) -> list[Any]:
        """Decode so many tokens in each row; returns the finished runs."""
        runs = self._runs(count)
        self._drive(runs)
        return runs

    def block_seconds(self, count: int) -> float:
        """Seconds that a block takes; where the first of many rows stops, until the last of the others is done."""
        if len(self.sessions) == 1 or not self.breakpoints:
            return clock.seconds(self.loaded.device, lambda: self.block(count))
        ends: list[float] = []
        clock.synchronize(self.loaded.device)
        start = time.perf_counter()
        runs = self._runs(count, lambda token: ends.append(time.perf_counter()))
        self._drive(runs)
        return ends[-1] - start

    def answer(self, prompts: torch.Tensor, work: Work, count: int) -> Answer:
        """The greedy continuation, with its logits."""
        self.close()
        self._open(len(prompts), work)
        runs = [
            session.generate(row, max_new_tokens=count, output_logits=True, **self._where(index))
            for index, (session, row) in enumerate(zip(self.sessions, prompts.tolist(), strict=True))
        ]
        self._drive(runs)
        results = [run.result() for run in runs]
        tokens = torch.stack([result.tokens[prompts.shape[1] :] for result in results])
        logits = torch.stack([result.logits.cpu() for result in results])
        self.close()
        return Answer(tokens, logits)

    def close(self) -> None:
        """Close the sessions."""
        for session in self.sessions:
            session.close()
        self.sessions = []

    def _open(self, rows: int, work: Work) -> None:
        for row in range(rows):
            session = self.dj.session()
            self.sessions.append(session)
            for edit in edits_of(own(work, row) if self.varied else work):
                session.steer(edit)

    def _where(self, index: int) -> dict[str, Any]:
        chosen = {"capture": self.capture} if self.capture else {}
        return {**chosen, "breakpoints": self.breakpoints} if self.breakpoints and index == 0 else chosen

    def _runs(self, count: int, told: Any = None) -> list[Any]:
        return [
            session.generate(
                None,
                max_new_tokens=count,
                on_token=told if index == len(self.sessions) - 1 else None,
                **self._where(index),
            )
            for index, session in enumerate(self.sessions)
        ]

    def _drive(self, runs: Sequence[Any]) -> None:
        if not self.breakpoints:
            self.dj.results(list(runs))
            return
        for stop in self.dj.as_stopped(list(runs)):
            self.stops += 1
            if self.touch is not None:
                stop.value.mul_(self.touch)


def with_stops(loaded: Loaded, dj: Any, layer: int, touch: float | None) -> OurDecoder:
    """A decoder whose first row stops at a layer on every generated token."""
    decoder = OurDecoder(loaded, dj)
    decoder.breakpoints = (djinn.break_at(f"resid_post.{layer}", positions="generated"),)
    decoder.touch = touch
    return decoder


def with_edits_of_their_own(loaded: Loaded, dj: Any) -> OurDecoder:
    """A decoder each of whose rows is scaled by factors of its own."""
    decoder = OurDecoder(loaded, dj)
    decoder.varied = True
    return decoder


def with_capture(loaded: Loaded, dj: Any) -> OurDecoder:
    """A decoder that captures every layer's output at every token."""
    decoder = OurDecoder(loaded, dj)
    decoder.capture = tuple(f"resid_post.{layer}" for layer in range(loaded.layers))
    return decoder
