"""The oracle against Hugging Face with forward hooks, which knows nothing of ours."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.specs import Edit, Feature
from tests.families import BLOCKS, CHUNK, EOS, LENGTH, WIDTH, family, noise, prompt
from tests.oracle import Call, Change, Oracle, Played, Script, Step

LAYERS = 2


def hook_edit(h: Tensor, edit: Edit) -> Tensor:
    """The change that an edit means, by its definition, for every position."""
    new = h * edit.scale
    if edit.add is not None:
        new = new + edit.add
    moved = new.clone()
    if edit.ablate is not None:
        for d in torch.linalg.svd(edit.ablate.reshape(-1, WIDTH), full_matrices=False).Vh:
            moved -= (new @ d)[..., None] * d
    if edit.feature is not None:
        assert isinstance(edit.feature.set, float)
        now = torch.relu(new @ edit.feature.read + edit.feature.bias)
        moved += (edit.feature.set - now)[..., None] * edit.feature.write
    return h + edit.strength * (moved - h)


def random_edit(rng: random.Random, site: str) -> Edit:
    """An edit whose strength means the same in any order of its parts: full, unless it has one part."""
    seed, kind = rng.randrange(1000), rng.choice(("scale", "add", "ablate", "feature", "all"))
    strength = 1.0 if kind == "all" else rng.choice((1.0, 0.5, -1.0))
    feature = Feature(noise(seed, WIDTH) / 6, noise(seed + 1, WIDTH) / 6, bias=0.3, act="relu", set=2.0)
    return Edit(
        site,
        scale=rng.choice((0.5, 1.5, -1.0)) if kind in ("scale", "all") else 1.0,
        add=noise(seed, WIDTH) if kind in ("add", "all") else None,
        ablate=noise(seed, 2, WIDTH) if kind in ("ablate", "all") else None,
        feature=feature if kind in ("feature", "all") else None,
        strength=strength,
        positions=rng.choice(("all", "prompt", "generated", "last_prompt", slice(3, 14), [2, 9, 20])),
    )


class Hooked:
    """A Hugging Face model fed step by step, its blocks' outputs edited as a script says."""

    def __init__(self, name: str, script: Script, last_prompt: int) -> None:
        self.model, self.script, self.last_prompt = family(name), script, last_prompt
        self.cache: Any = DynamicCache(config=self.model.config)
        self.span, self.prompt = (0, 0), 0
        self.handles = [
            self.model.get_submodule(f"{BLOCKS[name]}.{layer}").register_forward_hook(partial(self.hook, layer))
            for layer in range(LAYERS)
        ]

    def hook(self, layer: int, _module: object, _args: object, output: Any) -> Any:
        h: Tensor = output if isinstance(output, Tensor) else output[0]
        site, start = f"resid_post.{layer}", self.span[0]
        edits = [c.edit for c in self.script.changes if c.site == site and c.place < (start, layer)]
        if edits and edits[-1] is not None:
            gate = torch.tensor([self.speaks(edits[-1], at) for at in range(*self.span)])
            h = torch.where(gate[None, :, None], hook_edit(h, edits[-1]), h)
        if (start, site) in self.script.values:
            h = self.script.values[start, site][None]
        return h if isinstance(output, Tensor) else (h, *output[1:])

    def speaks(self, edit: Edit, at: int) -> bool:
        words: dict[object, bool] = {
            "all": True,
            "prompt": at < self.prompt,
            "generated": at >= self.prompt,
            "last_prompt": at == self.last_prompt,
        }
        if isinstance(edit.positions, str):
            return words[edit.positions]
        return at in range(100)[edit.positions] if isinstance(edit.positions, slice) else at in edit.positions  # type: ignore[operator]

    @torch.no_grad()
    def feed(self, tokens: list[int]) -> Tensor:
        """Logits ``[T, vocab]`` of the next tokens."""
        self.span = (self.span[1], self.span[1] + len(tokens))
        ids = torch.tensor([tokens])
        logits: Tensor = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0]
        return logits


def by_layer(script: Script, oracle: Oracle) -> Script:
    """The same script with places that count layers, as the oracle counts sites."""
    order = [oracle.table.get(f"resid_post.{layer}").order for layer in range(LAYERS)]
    changes = [
        Change((c.place[0], order[c.place[1]] if c.place[1] >= 0 else -1), c.site, c.edit) for c in script.changes
    ]
    return Script(script.calls, script.seeds, tuple(changes), script.values)


def random_script(rng: random.Random) -> Script:
    ids, grid = prompt(rng.randrange(1000), rng.choice((5, 8, 11, 16))), range(0, 24)
    starts = [at for at in grid if (at % CHUNK == 0 if at < len(ids) else True)]
    changes = sorted(
        ((rng.choice(starts), rng.randrange(-1, LAYERS)), f"resid_post.{rng.randrange(LAYERS)}")
        for _ in range(rng.randrange(1, 5))
    )
    made = [Change(place, site, random_edit(rng, site) if rng.random() < 0.8 else None) for place, site in changes]
    values = {}
    for start in rng.sample(starts, 2):
        count = min(CHUNK, len(ids) - start) if start < len(ids) else 1
        values[start, f"resid_post.{rng.randrange(LAYERS)}"] = 2 * noise(start, count, WIDTH)
    return Script((Call("generate", ids, new=rng.randrange(3, 9)),), changes=tuple(made), values=values)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_the_oracle_computes_what_hugging_face_computes_with_hooks(name: str) -> None:
    oracle, rng = Oracle(family(name), length=LENGTH, chunk=CHUNK, rank=3, eos=[EOS]), random.Random(name)
    sites = oracle.table.select("resid_post")
    worst = 0.0
    for _ in range(12):
        script = random_script(rng)
        played = oracle.play(by_layer(script, oracle), sites)
        ids = script.calls[0].tokens
        hooked = Hooked(name, script, len(ids) - 1)
        hooked.prompt = len(ids)
        try:
            wanted = [hooked.feed(step.tokens)[-1] for step in played.steps]
        finally:
            for handle in hooked.handles:
                handle.remove()
        drawn = [step for step in played.steps if step.stop >= len(ids)]
        assert len(drawn) == len(played.drawn)
        for mine, step in zip(played.drawn, drawn, strict=True):
            theirs = wanted[step.index]
            assert int(theirs.argmax()) == played.tokens[step.stop]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            worst = max(worst, float((mine - theirs).abs().max()))
        assert played.reason in ("eos", "length")
    assert worst > 0.0, "nothing was compared"


def test_calls_follow_each_other_as_one_text() -> None:
    """Several calls, one of them cut short, give the numbers of one forward pass over their tokens."""
    oracle = Oracle(family("llama"), length=LENGTH, chunk=CHUNK, rank=3)
    first, second, third = prompt(1, 9), prompt(2, 4), prompt(3, 10)
    sampling = SamplingSpec(True, 0.8, top_k=20)
    script = Script(
        (
            Call("forward", first),
            Call("generate", (), new=3, sampling=sampling),
            Call("generate", second, new=9, sampling=sampling, cut=(18, 19)),
            Call("forward", third[:8]),
        )
    )
    played = oracle.play(script, oracle.table.select("resid_post"))
    assert [step.start for step in played.steps] == [0, 8, 9, 10, 11, 16, 17, 18, 26]
    assert played.tokens[:9] + played.tokens[12:16] + played.tokens[19:] == [*first, *second, *third[:8]]
    assert [i for i, drawn in enumerate(played.sampled) if drawn] == [9, 10, 11, 16, 17, 18]
    ids = torch.tensor([played.tokens])
    with torch.no_grad():
        whole = family("llama")(input_ids=ids).logits[0]
    last = torch.cat([step.logits for step in played.steps[played.first :] if step.logits is not None])
    torch.testing.assert_close(last, whole[18:], rtol=1e-4, atol=1e-4)
    assert played.length == len(played.tokens) == 27 and played.finished


def test_a_watch_stops_before_the_value_is_replaced() -> None:
    oracle = Oracle(family("gpt2"), length=LENGTH, chunk=CHUNK, rank=3)
    sites = oracle.table.select("resid_post")
    new = noise(3, 4, WIDTH)
    plain = Script((Call("generate", prompt(1, 12), new=3),))
    edited = Script(plain.calls, values={(8, "resid_post.0"): new})

    def at(site: str) -> Played:
        def watch(step: Step, here: Any, _: Tensor) -> bool:
            return step.start == 8 and here.name == site

        return oracle.play(edited, sites, watch=watch)

    whole = oracle.play(plain, sites)
    stop, later = at("resid_post.0").stop, at("resid_post.1").stop
    assert stop is not None and later is not None
    assert torch.equal(stop[2], whole.steps[1].values["resid_post.0"])
    assert torch.equal(later[0].values["resid_post.0"], new)
    assert not torch.equal(later[2], whole.steps[1].values["resid_post.1"])
    assert at("resid_post.0").length == 8
    half = oracle.play(plain, sites, pause=(12, 13))
    assert half.paused and not half.finished and half.tokens == whole.tokens[:13]
