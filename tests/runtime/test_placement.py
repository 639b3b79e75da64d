"""Which layers stream under a budget: as few as it allows, evenly spread, and never what others share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from djinn_fx.errors import CapacityError, InvalidValue
from djinn_fx.runtime.placement import SLOTS, evenly, place
from tests.backends import least


def model_of(layers: int) -> Any:
    config = GPT2Config(n_layer=layers, n_embd=16, n_head=2, n_positions=16, vocab_size=32)
    return GPT2LMHeadModel(config).eval()


def own_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


def test_every_budget_is_kept_and_used() -> None:
    model = model_of(6)
    whole = place(model, None)
    one = whole.layers[0].nbytes
    assert whole.streamed == () and whole.device_bytes == own_bytes(model) and whole.streamed_bytes == 0
    for budget in range(least(model), own_bytes(model) + one, one // 3):
        found = place(model, budget)
        assert found.device_bytes <= budget
        assert found.streamed == () or SLOTS < len(found.streamed) <= 6
        assert found.streamed_bytes == one * len(found.streamed)
        # One layer more would not fit: three that stream take the room of two.
        if len(found.streamed) > SLOTS + 1:
            assert found.device_bytes + one > budget
    assert place(model, own_bytes(model)).streamed == ()
    assert len(place(model, least(model)).streamed) == 6


def test_what_is_too_little_is_refused_with_the_least_that_works() -> None:
    model = model_of(4)
    with pytest.raises(CapacityError, match=f"weights_bytes={least(model) - 1} is too little: {least(model)} bytes"):
        place(model, least(model) - 1)
    with pytest.raises(InvalidValue, match="give a number of bytes"):
        place(model, 0)


def test_a_model_of_few_layers_does_not_stream() -> None:
    model = model_of(2)
    assert place(model, own_bytes(model)).streamed == ()
    with pytest.raises(CapacityError, match=f"{own_bytes(model)} bytes are the least"):
        place(model, own_bytes(model) - 1)


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(InvalidValue, match="no list of num_hidden_layers"):
        place(nn.Linear(4, 4), 8)


def test_layers_that_stream_are_spread_evenly() -> None:
    assert evenly(0, 5) == ()
    assert evenly(3, 9) == (0, 3, 6)
    assert evenly(5, 5) == (0, 1, 2, 3, 4)
    assert all(len(set(evenly(count, 32))) == count for count in range(33))


def test_only_matrices_of_one_layer_alone_stream() -> None:
    model = model_of(3)
    blocks = model.transformer.h
    blocks[1].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight  # tied across layers
    blocks[2].mlp.c_fc.weight = nn.Parameter(blocks[2].mlp.c_fc.weight.detach().t().contiguous().t())
    streams = [{id(tensor) for tensor in layer.tensors} for layer in place(model, None).layers]
    assert id(blocks[0].attn.c_attn.weight) in streams[0]
    assert not any(id(blocks[0].mlp.c_fc.weight) in some for some in streams)
    assert id(blocks[2].mlp.c_fc.weight) not in streams[2]  # it does not lie in one piece
    assert id(blocks[0].ln_1.weight) not in streams[0] and id(model.lm_head.weight) not in set().union(*streams)


def test_the_weights_of_a_layer_lie_side_by_side() -> None:
    layer = place(model_of(3), None).layers[1]
    memory = torch.zeros(layer.nbytes, dtype=torch.uint8)
    for number, (view, tensor) in enumerate(zip(layer.views(memory), layer.tensors, strict=True), 1):
        assert view.shape == tensor.shape and view.dtype == tensor.dtype
        assert not view.any()
        view.fill_(number)
