"""Users' inputs made into token lists, and outputs put back into the users' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from djinn_fx.errors import CapacityError, InvalidValue

if TYPE_CHECKING:
    from djinn_fx.runtime.options import Tokenizer
    from djinn_fx.runtime.steps import Step

_FORMS = "a str, a list of ints, a LongTensor [T] or [1, T], or a mapping with 'input_ids'"


def one_prompt(inputs: object, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The tokens of one prompt.

    Raises:
        InvalidValue: not one prompt, a text without a tokenizer, or token ids outside the vocabulary.
    """
    batch = prompt_batch(inputs, tokenizer, vocab_size)
    if len(batch.rows) != 1:
        raise InvalidValue(
            f"one prompt was expected, but the input holds {len(batch.rows)}. Use dj.generate(prompts) or dj(inputs) "
            "for several."
        )
    return batch.rows[0]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts without pads, and where each token stood in the user's layout.

    Attributes:
        rows: tokens of each prompt.
        columns: for each prompt, the column of each of its tokens; None where none is a pad.
        width: columns of the user's layout.
        steps: where the one row is a session's: the steps in which it computed its tokens.
        before: keys and values of each layer at the positions before those steps, ``[heads, positions, dim]``.
    """

    rows: list[list[int]]
    columns: list[list[int]] | None
    width: int
    steps: tuple[Step, ...] | None = None
    before: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

    @property
    def places(self) -> list[list[int]]:
        """For each prompt, the column of each of its tokens."""
        return [list(range(len(row))) for row in self.rows] if self.columns is None else self.columns

    def spread(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows ``[tokens, ...]`` put into the user's layout ``[B, width, ...]``, zeros at pads."""
        if all(len(value) == self.width for value in values):
            return torch.stack(list(values))  # no pads
        first = values[0]
        out = first.new_zeros((len(values), self.width, *first.shape[1:]))
        for row, (value, places) in enumerate(zip(values, self.places, strict=True)):
            out[row, places] = value
        return out

    def gather(self, spread: torch.Tensor, row: int) -> torch.Tensor:
        """The inverse of :meth:`spread` for one row: ``[tokens, ...]``."""
        return spread[row, self.places[row]]


def prompt_batch(inputs: object, tokenizer: Tokenizer | None, vocab_size: int) -> PromptBatch:
    """Tokens of one or many prompts; ``attention_mask`` removes pads, left or right.

    Raises:
        InvalidValue: a form that is not understood, ids outside the vocabulary, or a mask of another shape.
    """
    mask: object = None
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise InvalidValue(f"the mapping has no 'input_ids' (keys: {', '.join(map(str, inputs))}).")
        mask, inputs = inputs.get("attention_mask"), inputs["input_ids"]
    if isinstance(mask, torch.Tensor):
        mask = (mask != 0).long()  # masks may be bool or float
    rows = _rows(inputs, tokenizer)
    if mask is None:
        kept, places = rows, None
    else:
        places = _places(rows, mask)
        kept = [row[where[0] : where[-1] + 1] if where else [] for row, where in zip(rows, places, strict=True)]
    for index, row in enumerate(kept):
        if row and not (min(row) >= 0 and max(row) < vocab_size):
            wrong = next(token for token in row if not 0 <= token < vocab_size)
            raise InvalidValue(f"token id {wrong}{_whose(index, len(rows))} is outside the vocabulary of {vocab_size}.")
    return PromptBatch(kept, places, max((len(row) for row in rows), default=0))


def _places(rows: Sequence[Sequence[int]], mask: object) -> list[list[int]]:
    """The column of each token that an attention mask shows."""
    masks = _rows(mask, None)
    if [len(row) for row in masks] != [len(row) for row in rows]:
        raise InvalidValue("attention_mask and input_ids differ in shape.")
    places = [[i for i, seen in enumerate(row) if seen] for row in masks]
    for index, where in enumerate(places):
        if where and where[-1] - where[0] + 1 != len(where):
            raise InvalidValue(
                f"attention_mask hides a token{_whose(index, len(rows))} between two visible ones; pads may stand left "
                "or right only."
            )
    return places


def _whose(index: int, count: int) -> str:
    """Which of many prompts an error is about."""
    return "" if count == 1 else f" of prompts[{index}]"


def require_lengths(rows: Sequence[Sequence[int]], most: int) -> None:
    """Raise before anything is computed where one of many prompts cannot be taken.

    Args:
        rows: the prompts' tokens.
        most: positions of a session.

    Raises:
        InvalidValue: a prompt is empty.
        CapacityError: a prompt is longer than a session.
    """
    for index, row in enumerate(rows):
        name = "the prompt" if len(rows) == 1 else f"prompts[{index}]"
        if not row:
            raise InvalidValue(f"{name} is empty. Give at least one token.")
        if len(row) > most:
            raise CapacityError(
                f"{name} has {len(row)} tokens, but a session has room for {most} (max_length={most}). Nothing was "
                "computed; shorten it, or compile with a larger max_length."
            )


def _rows(inputs: object, tokenizer: Tokenizer | None) -> list[list[int]]:
    if isinstance(inputs, str):
        return [_encode(inputs, tokenizer)]
    if isinstance(inputs, torch.Tensor):
        if inputs.dtype.is_floating_point or inputs.dtype == torch.bool or inputs.dim() not in (1, 2):
            raise InvalidValue(
                f"token ids must be integers of shape [T] or [B, T], got {inputs.dtype} {tuple(inputs.shape)}."
            )
        found: list[Any] = inputs.tolist()
        return [found] if inputs.dim() == 1 else found
    if isinstance(inputs, Sequence):
        items = list(inputs)
        kinds = set(map(type, items))
        if all(issubclass(kind, int) and kind is not bool for kind in kinds):
            return [items]
        rows: list[list[int]] = []
        for item in items:
            rows += prompt_batch(item, tokenizer, 1 << 62).rows if isinstance(item, Mapping) else _rows(item, tokenizer)
        return rows
    raise InvalidValue(f"cannot read {type(inputs).__name__} as a prompt; give {_FORMS}.")


def _encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise InvalidValue(
            "a prompt given as text needs a tokenizer: djinn.compile(model, tokenizer=...), or give token ids."
        )
    return [int(token) for token in tokenizer(text)["input_ids"]]
