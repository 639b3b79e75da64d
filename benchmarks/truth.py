"""The right answers of a decode: those of Hugging Face's eager model with forward hooks."""

from __future__ import annotations

import torch

from djinn_fx.benchmarks.answers import Answer, Judgement, Work, judge
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.ours import own
from djinn_fx.benchmarks.peers.hooks import HooksDecoder

#: Steps whose logits are compared.
COMPARED = 6


class Truth:
    """The right answers, from Hugging Face's eager model with forward hooks, computed when first asked for.

    Attributes:
        prompts: of every row.
        works: by key.
        allowed: tolerance.
    """

    def __init__(self, loaded: Loaded, prompts: torch.Tensor, todo: dict[str, Work], allowed: float) -> None:
        self.prompts, self.works, self.allowed = prompts, todo, allowed
        self.decoder = HooksDecoder(loaded)
        self.known: dict[tuple[str, int], Answer] = {}

    def answer(self, key: str, rows: int = 1) -> Answer:
        """The right answer of so many rows; under the key ``varied`` each row has edits of its own."""
        if (key, rows) not in self.known:
            if key == "varied":
                singles = [
                    self.decoder.answer(self.prompts[row : row + 1], own(self.works["scale"], row), COMPARED)
                    for row in range(rows)
                ]
                logits = torch.cat([single.logits for single in singles if single.logits is not None])
                found = Answer(torch.cat([single.tokens for single in singles]), logits)
            else:
                found = self.decoder.answer(self.prompts[:rows], self.works[key], COMPARED)
            self.decoder.close()
            self.known[key, rows] = found
        return self.known[key, rows]

    def judge(self, key: str, answer: Answer, *, after: int = 0) -> Judgement:
        """Compare an answer to a work's right one, the rows from ``after`` on."""
        rows = len(answer.tokens)
        ignored = None if key == "plain" else _rows_of(self.answer("plain", rows), after)
        return judge(_rows_of(self.answer(key, rows), after), _rows_of(answer, after), self.allowed, ignored)


def _rows_of(answer: Answer, after: int) -> Answer:
    return Answer(answer.tokens[after:], None if answer.logits is None else answer.logits[after:])
