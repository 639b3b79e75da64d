"""Token ids: which tensors and lists are prompts, and where pads may stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.inputs import one_prompt, prompt_batch

VOCAB = 64


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_of_a_tensor(dtype: torch.dtype) -> None:
    # Catches: a bound that is off by one, or a dtype that is not looked at.
    ids = torch.tensor([0, 63, 5], dtype=dtype)
    assert one_prompt(ids, None, VOCAB) == one_prompt(ids[None], None, VOCAB) == [0, 63, 5]
    for wrong in (-1, 64) if dtype.is_signed else (64,):
        with pytest.raises(djinn.InvalidValue, match=rf"token id {wrong} of prompts.1. is outside the vocabulary"):
            prompt_batch(torch.tensor([[0, 63], [5, wrong]], dtype=dtype), None, VOCAB)


def test_a_pad_may_be_outside_the_vocabulary() -> None:
    # Catches: pads that are taken for tokens; a token beside pads that is not looked at.
    ids: dict[str, Any] = {
        "input_ids": torch.tensor([[-100, 3, 4], [5, 6, 64]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]]),
    }
    assert prompt_batch(ids, None, VOCAB).rows == [[3, 4], [5, 6]]
    with pytest.raises(djinn.InvalidValue, match=r"token id 64 of prompts.1. is outside"):
        prompt_batch(ids | {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}, None, VOCAB)


@pytest.mark.parametrize("ids", [torch.empty(0, dtype=torch.int64), torch.empty(1, 0, dtype=torch.int64), []])
def test_no_ids_are_an_empty_prompt(ids: object) -> None:
    # Catches: the least of no numbers.
    assert one_prompt(ids, None, VOCAB) == []


@pytest.mark.parametrize("ids", [[True, 3], torch.tensor([True]), [torch.tensor(3).numpy(), 3], torch.tensor([0.5])])
def test_what_is_no_id_is_refused(ids: object) -> None:
    # Catches: numbers that happen to compare as ids do.
    with pytest.raises(djinn.InvalidValue):
        one_prompt(ids, None, VOCAB)
