"""Steps that run on from their stops on a GPU, against the same steps run whole: the same bits, whatever is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import djinn_fx as djinn
from djinn_fx.runtime.lanes import Lanes
from djinn_fx.runtime.poised import Poised
from djinn_fx.runtime.stop import Stop
from tests.bits import assert_same_bits

pytestmark = pytest.mark.gpu

NEW, LAYERS = 8, 3

Act = Callable[[djinn.Stop], None]


@cache
def compiled(name: str) -> djinn.Dj:
    """Wide enough for the matrix kernels that take the edits along."""
    torch.manual_seed(0)
    model: Any
    if name == "gpt2":
        model, dtype = GPT2LMHeadModel(GPT2Config(n_layer=LAYERS, n_positions=128, vocab_size=512)), torch.bfloat16
    else:
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2}
        config = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=512, max_position_embeddings=128, **sizes)  # type: ignore[arg-type]
        model, dtype = LlamaForCausalLM(config), torch.float16
    return djinn.compile(
        model.to("cuda", dtype).eval(), sites="resid_post", max_sessions=4, max_length=64, verify=False
    )


@pytest.fixture(params=["gpt2", "llama"])
def dj(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    made = compiled(request.param)
    yield made
    for session in list(made.engine.sessions):
        session.close()


def everything(dj: djinn.Dj, act: Act) -> tuple[list[int], list[Tensor]]:
    """Tokens, logits, and the values at all stops as they were found, and afterwards again."""
    found: list[Tensor] = []
    with dj.session(seed=1) as session:
        run = session.generate(
            list(range(3, 20)),
            max_new_tokens=NEW,
            breakpoints=[djinn.break_at("resid_post.*", positions="generated")],
            output_logits=True,
        )
        for stop in run:
            found.append(stop.value.clone())
            act(stop)
        result = run.result()
        for position in reversed(range(17, 17 + NEW - 1)):
            again = run.rewind(position, f"resid_post.{LAYERS - 1}")
            found.append(again.value.clone())
    assert result.logits is not None
    return result.tokens.tolist(), [result.logits, *found]


def scaled(stop: djinn.Stop) -> None:
    stop.value.mul_(-1.5)


def first(stop: djinn.Stop) -> None:
    if stop.layer == 0:
        scaled(stop)


def two_of_three(stop: djinn.Stop) -> None:
    if stop.layer != 1:
        stop.value.add_(0.25 * stop.position)


def every_other_step(stop: djinn.Stop) -> None:
    if stop.position % 2:
        scaled(stop)


def steered(stop: djinn.Stop) -> None:
    stop.session.steer("resid_post.2", scale=1.0 + stop.position / 64)
    if stop.layer == 1:
        scaled(stop)


def no_edit(stop: djinn.Stop) -> None:
    stop.value.mul_(-1).mul_(-1)


def kept(stop: djinn.Stop) -> None:
    """The checkpoint of an edited stop goes on as the stop does."""
    scaled(stop)
    with stop.session.engine.lock:
        taken = stop.checkpoint()
    assert taken.nbytes > 0


ACTS = [scaled, first, two_of_three, every_other_step, steered, no_edit, kept]


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_the_bits_of_whole_steps(dj: djinn.Dj, act: Act) -> None:
    with mock.patch.object(Stop, "_make_ready", lambda stop: None):
        expected = everything(dj, act)
    ready, ways, inject, posts = Poised.ready, [], Lanes.inject, []

    def watched(poised: Poised) -> Any:
        way, part = ready(poised)
        ways.append(way is poised.short)
        return way, part

    def injected(lanes: Lanes, *given: Any, post: bool = False) -> None:
        posts.append(post)
        inject(lanes, *given, post=post)

    with mock.patch.object(Poised, "ready", watched), mock.patch.object(Lanes, "inject", injected):
        for _ in range(3):
            found = everything(dj, act)
            assert found[0] == expected[0]
            for mine, other in zip(found[1], expected[1], strict=True):
                assert_same_bits(mine, other)
    assert act is steered or (True in ways and True in posts)
