"""Steering from contrast pairs, on generated tokens only.

A direction is the difference of means over pairs of prompts that differ in one thing. It is added while the model
writes, and not while it reads: what the model knows of the prompt stays as it was. Many prompts, each with its own
edits, run as one batch.
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, max_sessions=16)
pairs = contrast()  # the storyteller's own: prompts that differ in mood alone
site = "resid_post.1"
print(pairs.joyful[0], "|", pairs.gloomy[0])

# %% [markdown]
# ## The direction
#
# Eight pairs make it, the other four test it. `positions=-1` keeps each prompt's last token, whatever its length.

# %%
ends = [
    dj.run_with_cache(list(side[:8]), site, positions=-1, logits=False)[1][site]
    for side in (pairs.joyful, pairs.gloomy)
]
direction = (ends[0] - ends[1]).mean((0, 1))  # [hidden]
print(f"length {direction.norm():.1f}, beside a residual of {ends[0].norm(dim=-1).mean():.1f}")

# %% [markdown]
# ## Four prompts, four strengths, one batch
#
# `positions="generated"` means the positions whose input token the model drew itself. The prompt's last token is not
# one of them: the first new token comes out as it would have, and the mood turns from there.

# %%
strengths = (0.0, 0.5, 1.0, 1.5)
prompts = pairs.gloomy[8:]
results = dj.generate(
    [prompt for _ in strengths for prompt in prompts],
    max_new_tokens=60,
    edits=[
        [djinn.Edit(site, add=direction, strength=strength, positions="generated")]
        for strength in strengths
        for _ in prompts
    ],
)


def moods(texts: list[str]) -> tuple[int, int]:
    """How many joyful and how many gloomy words."""
    said = [word.strip(".,!?\"'").lower() for text in texts for word in text.split()]
    return sum(word in pairs.joyful_words for word in said), sum(word in pairs.gloomy_words for word in said)


counts = {}
for index, strength in enumerate(strengths):
    texts = [result.text or "" for result in results[4 * index : 4 * index + 4]]
    counts[strength] = moods(texts)
    print(f"{strength:+.1f} x direction: {counts[strength][0]:2} joyful words, {counts[strength][1]:2} gloomy ones")
    print("    ", texts[0][:110].strip())

firsts = {int(result.tokens[len(tokenizer(prompts[0])["input_ids"])]) for result in results[::4]}
assert len(firsts) == 1, "the first new token is that of the unsteered model"
assert counts[0.0][0] == 0, "unsteered, gloomy prompts stay gloomy"
assert counts[1.5][0] > 9 * counts[1.5][1], "steered, they turn"

# %% [markdown]
# ## What it left alone
#
# Strength 0 is no change at all, and the values at the prompt's positions are the same bit for bit, steered or not.

# %%
seen = []
for strength in (0.0, 1.5):
    with dj.session() as s:
        s.steer(site, add=direction, strength=strength, positions="generated")
        run = s.generate(prompts[0], max_new_tokens=12, capture=["resid_post.3"])
        result = run.result()
        seen.append(result.cache["resid_post.3"])
length = run.prompt_end - run.prompt_start
assert torch.equal(seen[0][:length], seen[1][:length]) and not torch.equal(seen[0][length:], seen[1][length:])
plain = dj.generate(list(prompts), max_new_tokens=60)
assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, results[:4], strict=True))
result

# %% [markdown]
# ## Changing its mind
#
# A handle changes the strength from here on, also in the middle of a story, here after 20 tokens and back after 40.

# %%
with dj.session() as s:
    handle = s.steer(site, add=direction, strength=0.0, positions="generated")
    for strength in (0.0, 1.5, -1.5):
        handle.strength = strength
        text = s.generate(None if s.tokens.numel() else prompts[0], max_new_tokens=20).result().text or ""
        print(f"{strength:+.1f}: {text.strip()}")
        assert moods([text])[0 if strength <= 0 else 1] <= 1
