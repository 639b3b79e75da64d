"""The bundled storyteller is small, told well, and turns along its mood direction."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from examples import storyteller_grammar as grammar

HOME = Path(__file__).parents[2] / "djinn_fx" / "data" / "storyteller"
LAYER, ALPHA = 1, 1.5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from a second thread, and waits for it where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(HOME, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    loaded = AutoModelForCausalLM.from_pretrained(HOME, local_files_only=True)
    assert isinstance(loaded, GPT2LMHeadModel)
    return loaded


@pytest.fixture(scope="module")
def contrast() -> dict[str, list[str]]:
    return cast(dict[str, list[str]], json.loads((HOME / "contrast.json").read_text("utf-8")))


def test_weights_fit_in_the_box() -> None:
    assert (HOME / "model.safetensors").stat().st_size <= 3_000_000


def test_tokenizer_gives_stories_back(tokenizer: Any) -> None:
    rng = random.Random("round trip")
    for _ in range(200):
        text = grammar.story(rng)
        ids = tokenizer.encode(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.decode([i]) for i in ids) == text


def test_tokenizer_marks_unknown_words(tokenizer: Any) -> None:
    assert tokenizer.unk_token_id in tokenizer.encode("Mara felt quixotic.")


def test_special_tokens_agree(tokenizer: Any, model: GPT2LMHeadModel) -> None:
    generation = model.generation_config
    assert generation is not None
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_lists_are_the_grammars(tokenizer: Any, contrast: dict[str, list[str]]) -> None:
    assert list(zip(contrast["joyful"], contrast["gloomy"], strict=True)) == grammar.contrast()
    assert contrast["neutral"] == list(grammar.NEUTRAL)
    assert set(contrast["joyful_words"]) == grammar.joyful_words()
    assert set(contrast["gloomy_words"]) == grammar.gloomy_words()
    assert not grammar.joyful_words() & grammar.gloomy_words()
    for prompt in (*contrast["joyful"], *contrast["gloomy"], *contrast["neutral"]):
        assert tokenizer.unk_token_id not in tokenizer.encode(prompt)
    assert {grammar.joyful_share(prompt) for prompt in contrast["joyful"]} == {1.0}
    assert {grammar.joyful_share(prompt) for prompt in contrast["gloomy"]} == {0.0}
    assert {grammar.joyful_share(prompt) for prompt in contrast["neutral"]} == {0.5}


@torch.no_grad()
def test_held_out_loss(model: GPT2LMHeadModel, tokenizer: Any) -> None:
    """The grammar's entropy is the floor; the model is within a few hundredths of a nat of it."""
    rng = random.Random("held out")
    told = [grammar.told(rng) for _ in range(64)]
    ids = tokenizer([f"<eos>{text}<eos>" for text, _ in told], padding=True, return_tensors="pt")
    batch, mask = ids["input_ids"], ids["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == tokenizer.pad_token_id, -100)
    targets = targets.masked_fill(mask[:, :-1] == 0, -100)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    entropy = sum(nats for _, nats in told) / int((targets != -100).sum())
    assert entropy - 0.01 < loss < entropy + 0.03


@torch.no_grad()
def test_direction_turns_the_mood(model: GPT2LMHeadModel, tokenizer: Any, contrast: dict[str, list[str]]) -> None:
    block = model.transformer.h[LAYER]

    def last(prompts: list[str]) -> Tensor:
        found: list[Tensor] = []
        handle = block.register_forward_hook(lambda _m, _i, out: found.append(out[:, -1]))
        model(**tokenizer(prompts, padding=True, return_tensors="pt"))
        handle.remove()
        return found[0].mean(0)

    def share(shift: Tensor) -> float:
        handle = block.register_forward_hook(lambda _m, _i, out: out + shift)
        inputs = tokenizer(contrast["gloomy"], padding=True, return_tensors="pt")
        tokens = cast(Any, model).generate(**inputs, max_new_tokens=32, do_sample=False)
        handle.remove()
        continued = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(continued, skip_special_tokens=True)
        return grammar.joyful_share(" ".join(texts))

    direction = last(contrast["joyful"]) - last(contrast["gloomy"])
    assert share(0 * direction) < 0.1
    assert share(ALPHA * direction) > 0.9
