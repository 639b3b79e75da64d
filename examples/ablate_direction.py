"""Ablating a direction at all layers, for 16 prompts with different strengths.

The mood's direction is projected out of the residual stream after every block, while sixteen prompts are continued in
one batch; each prompt has its own strength. A whole ablation leaves the model with no mood to go by: pairs of prompts
that differ in mood alone are then told on in the same words.
"""

# %%
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, max_sessions=16)
pairs = contrast()
layers = [site for site in dj.compiled_sites if site.startswith("resid_post")]
print(layers)

# %% [markdown]
# ## The direction
#
# Difference of means after the first block, as a unit vector.

# %%
ends = [
    dj.run_with_cache(list(side), layers[0], positions=-1, logits=False)[1][layers[0]]
    for side in (pairs.joyful, pairs.gloomy)
]
direction = (ends[0] - ends[1]).mean((0, 1))
direction = direction / direction.norm()

# %% [markdown]
# ## Sixteen prompts, each with its strength
#
# An edit takes one site, so a prompt has one edit per layer. `ablate` takes a direction of any length, or several.
# Strength 1 removes what lies along it; 0.5 half of it; 2 mirrors it, here four times over, which brings it back.

# %%
strengths = (0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.5, 2.0)
prompts = [prompt for pair in zip(pairs.joyful[:8], pairs.gloomy[:8], strict=True) for prompt in pair]
each = [strength for strength in strengths for _ in range(2)]  # both prompts of a pair alike
edits = [[djinn.Edit(site, ablate=direction, strength=strength) for site in layers] for strength in each]
results = dj.generate(prompts, max_new_tokens=40, edits=edits, capture=layers)


def mood(text: str) -> str:
    """Joyful and gloomy words of a text."""
    said = [word.strip(".,!?\"'").lower() for word in text.split()]
    joyful, gloomy = (sum(word in known for word in said) for known in (pairs.joyful_words, pairs.gloomy_words))
    return f"{joyful:2} joyful, {gloomy:2} gloomy"


for index in range(0, 16, 2):
    joyful, gloomy = (result.text or "" for result in results[index : index + 2])
    same = "the same words" if joyful == gloomy else ""
    print(f"strength {each[index]:4}: from a joyful prompt {mood(joyful)}; from a gloomy one {mood(gloomy)}  {same}")

# %% [markdown]
# ## What is left along the direction
#
# Each result's cache has what its own edits made of the residual stream. After the first block, and on the prompt's
# positions, that is just (1 - strength) times what was there.

# %%
for prompt, strength, result in zip(prompts, each, results, strict=True):
    count = len(tokenizer(prompt)["input_ids"])
    before = dj.run_with_cache(prompt, layers[0], logits=False)[1][layers[0]][0] @ direction
    after = result.cache[layers[0]][:count] @ direction
    torch.testing.assert_close(after, (1 - strength) * before, atol=1e-3, rtol=1e-3)

whole = [index for index, strength in enumerate(each) if strength == 1.0]
for index in whole:
    left = max(float((results[index].cache[site] @ direction).abs().max()) for site in layers)
    assert left < 1e-3, "nothing is left at any layer"
results[whole[0]]

# %% [markdown]
# ## The claim
#
# With strength 1 both prompts of a pair lead to the same story; with strength 0 each keeps its mood.

# %%
for index in whole[::2]:
    assert results[index].text == results[index + 1].text
    print(prompts[index], "/", prompts[index + 1], "...", (results[index].text or "").strip())
assert results[0].text != results[1].text
