"""Eight branches from one stop, with different edits.

A run stops once, in the middle of the prompt's forward pass. Eight forks stand at the same place, with the KV cache copied on the
device; each gets another edit, and all are decoded as one batch. What differs between them comes from the edits alone.
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, max_sessions=9)  # the parent and eight forks
pairs, site = contrast(), "resid_post.1"
ends = [dj.run_with_cache(list(side), site, positions=-1, logits=False)[1][site] for side in (pairs.joyful, pairs.gloomy)]
direction = (ends[0] - ends[1]).mean((0, 1))

# %% [markdown]
# ## One stop
#
# The prompt's first half has run once, for all of them. The logit lens below is that of the prompt's last tokens.

# %%
s = dj.session(seed=0)
run = s.generate("On a cold afternoon, Tom trudged to the", max_new_tokens=40, breakpoints=[site])
parent = next(run)
parent

# %% [markdown]
# ## Eight edits
#
# Written into the stopped value, here at all positions of the prompt. The first fork is left alone.

# %%
forks = parent.fork(8)
noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))
noise *= 1.5 * direction.norm() / noise.norm()
edits = {
    "left alone": torch.zeros_like(direction),
    "+0.5 mood": 0.5 * direction,
    "+1 mood": 1.0 * direction,
    "+1.5 mood": 1.5 * direction,
    "+2 mood": 2.0 * direction,
    "-1.5 mood": -1.5 * direction,
    "noise of length 1.5": noise,
    "1.5 mood at the last position": 1.5 * direction,
}
for fork, (name, change) in zip(forks, edits.items(), strict=True):
    where = slice(-1, None) if "last" in name else slice(None)
    fork.value[where] += change

# %% [markdown]
# ## All of them on
#
# `dj.results` drives the runs together, one batched step at a time. The parent is one of them.

# %%
result, *results = dj.results([run, *(fork.run for fork in forks)])


def moods(text: str | None) -> tuple[int, int]:
    """How many joyful and how many gloomy words."""
    said = [word.strip(".,!?\"'").lower() for word in (text or "").split()]
    return sum(word in pairs.joyful_words for word in said), sum(word in pairs.gloomy_words for word in said)


for name, branch in zip(edits, results, strict=True):
    joyful, gloomy = moods(branch.text)
    print(f"{name:30} {joyful} joyful, {gloomy} gloomy  {(branch.text or '').strip()[:70]}")

assert torch.equal(results[0].tokens, result.tokens), "a fork left alone is its parent"
assert moods(results[3].text)[0] > moods(results[3].text)[1], "the direction turns the story"
assert moods(results[6].text)[0] == 0, "noise of the same length does not"

# %% [markdown]
# ## Two branches side by side
#
# Where they part, and how far apart the plain model's predictions are on the two texts.

# %%
found = djinn.diff(run, forks[3].run, dj=dj)
print("the texts part at position", found.first_difference)
found

# %%
s.close()  # and its forks
dj.memory()
