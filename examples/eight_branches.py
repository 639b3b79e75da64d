"""Eight branches from one stop, with different edits.

A run stops once, in the middle of the prompt's forward pass. Eight forks stand at the same place, with the KV cache
copied on the device; each gets another edit, and all are decoded as one batch. What differs between them comes from
the edits alone.
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, max_sessions=9)  # the parent and eight forks
pairs, site = contrast(), "resid_post.1"
ends = [
    dj.run_with_cache(list(side), site, positions=-1, logits=False)[1][site] for side in (pairs.joyful, pairs.gloomy)
]
direction = (ends[0] - ends[1]).mean((0, 1))

# %% [markdown]
# ## One stop
#
# The first half of the forward pass has run once, for all of them. The story's next word will set its mood: the logit
# lens shows that nothing is decided here.

# %%
s = dj.session(seed=0)
run = s.generate("It was a", max_new_tokens=40, breakpoints=[site])
parent = next(run)
parent

# %% [markdown]
# ## Eight edits
#
# Written into the stopped value, at the last position; a standing edit acts from here on, also on the tokens to come.

# %%
forks = dict(
    zip(
        [
            "left alone",
            "+1 mood",
            "+2 mood",
            "-1 mood",
            "halved",
            "from another prompt",
            "noise",
            "steered from here on",
        ],
        parent.fork(8),
        strict=True,
    )
)
last = {name: fork.value[-1] for name, fork in forks.items()}  # [hidden], writable
last["+1 mood"] += direction
last["+2 mood"] += 2 * direction
last["-1 mood"] -= direction
last["halved"] *= 0.5
other = dj.run_with_cache("The sky above the waves was clear, and Felix felt", site, positions=-1, logits=False)[1]
last["from another prompt"].copy_(other[site][0, -1])
noise = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))
last["noise"] += 2 * direction.norm() / noise.norm() * noise
handle = forks["steered from here on"].session.steer(site, add=direction, strength=1.5)

# %% [markdown]
# ## All of them on
#
# `dj.results` drives the runs together, one batched step at a time. The parent is one of them. Mind the control:
# where nothing is decided yet, noise of twice the direction's length decides too.

# %%
whole, *branches = dj.results([run, *(fork.run for fork in forks.values())])
results = dict(zip(forks, branches, strict=True))


def moods(text: str | None) -> tuple[int, int]:
    """How many joyful and how many gloomy words."""
    said = [word.strip(".,!?\"'").lower() for word in (text or "").split()]
    return sum(word in pairs.joyful_words for word in said), sum(word in pairs.gloomy_words for word in said)


for name, branch in results.items():
    joyful, gloomy = moods(branch.text)
    print(f"{name:21} {joyful} joyful, {gloomy} gloomy: It was a{(branch.text or '')[:60]}")

assert torch.equal(results["left alone"].tokens, whole.tokens), "a fork left alone is its parent"
assert moods(results["left alone"].text)[0] == 0 < moods(results["+1 mood"].text)[0], "one edit turns the whole story"
assert len({branch.text for branch in branches}) >= 5

# %% [markdown]
# ## Two branches side by side
#
# Where they part, and how far apart the plain model's predictions are on the two texts.

# %%
found = djinn.diff(run, forks["+1 mood"].run, dj=dj)
print("the texts part at position", found.first_difference)
found

# %%
s.close()  # and its forks
dj.memory()
