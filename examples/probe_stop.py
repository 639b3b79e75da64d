"""A probe that stops generation when it fires; edit, and go on.

A linear probe for the story's mood is trained on activations, in a second. As a breakpoint it is asked at every
generated token, on the device. Where it fires the run stops in the middle of that token's forward pass; the
activation is moved to the other side of the probe, and the run goes on.
"""

# %%
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

torch.manual_seed(0)
model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
pairs, site = contrast(), "resid_post.1"

# %% [markdown]
# ## Data
#
# Stories told on from joyful and gloomy prompts, and the values of a site at every position behind the prompt.

# %%
prompts = [*pairs.joyful, *pairs.gloomy]
stories = dj.generate(prompts, max_new_tokens=40, do_sample=True, temperature=0.7, capture=[site])
values, labels = [], []
for index, (prompt, story) in enumerate(zip(prompts, stories, strict=True)):
    kept = story.cache[site][len(tokenizer(prompt)["input_ids"]) :]
    values.append(kept)
    labels.append(torch.full((len(kept),), float(index >= len(pairs.joyful))))
x, y = torch.cat(values), torch.cat(labels)
print(f"{len(x)} positions, {y.mean():.0%} of them gloomy")

# %% [markdown]
# ## The probe
#
# Logistic regression with a little weight decay; every fifth story is kept out.

# %%
story_of = torch.cat([torch.full((len(part),), index) for index, part in enumerate(values)])
held_out = story_of % 5 == 0
mean, scale = x[~held_out].mean(0), x[~held_out].std()
probe = torch.nn.Linear(x.shape[1], 1)
optimizer = torch.optim.Adam(probe.parameters(), lr=0.05, weight_decay=1e-3)
for _ in range(200):
    logits = probe((x[~held_out] - mean) / scale).squeeze(-1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y[~held_out])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

w = probe.weight.detach()[0] / scale  # in the model's own units
b = float(probe.bias.detach()) - float(w @ mean)
right = ((x[held_out] @ w + b > 0) == y[held_out].bool()).float().mean()
print(f"right on {right:.0%} of the positions of stories it has not seen")
assert right > 0.8

# %% [markdown]
# ## A breakpoint that asks it
#
# `margin` keeps it from firing at every doubt. Left alone at each stop, the run goes on bit for bit as if it had
# never stopped.

# %%
margin, prompt, seed = 3.0, pairs.neutral[2], 2
gloomy = djinn.break_at(site, when=djinn.when.probe(w, b - margin), positions="generated")


def tell(session: djinn.Session, *breakpoints: djinn.Breakpoint) -> djinn.Run:
    """A run that draws 60 tokens, the same ones whenever the model says the same."""
    return session.generate(prompt, max_new_tokens=60, do_sample=True, temperature=0.7, breakpoints=breakpoints)


def moods(text: str | None) -> tuple[int, int]:
    """How many joyful and how many gloomy words."""
    said = [word.strip(".,!?\"'").lower() for word in (text or "").split()]
    return sum(word in pairs.joyful_words for word in said), sum(word in pairs.gloomy_words for word in said)


with dj.session(seed=seed) as s:
    plain = tell(s).result()
with dj.session(seed=seed) as s:
    run = tell(s, gloomy)
    fired = [stop.position for stop in run]  # looked at, left alone
    assert torch.equal(run.tokens, plain.tokens)
print(prompt, plain.text)
print(f"{len(fired)} of 60 positions fire; joyful and gloomy words: {moods(plain.text)}")
assert moods(plain.text)[0] == 0

# %% [markdown]
# ## Stop, edit, go on
#
# First the smallest change that silences the probe: along `w`, to the other side. It does, and the story stays
# gloomy. A direction that reads well need not write well.

# %%
with dj.session(seed=seed) as s:
    run = tell(s, gloomy)
    silenced = 0
    for stop in run:
        h = stop.value[-1]  # writable, on the device
        h -= (h @ w + b + margin) / (w @ w) * w
        assert abs(float(h @ w + b) + margin) < 1e-2
        silenced += 1
    print(f"edited {silenced} times; joyful and gloomy words: {moods(run.text)}")
    assert moods(run.text)[0] == 0

# %% [markdown]
# The difference of the two moods' means writes. Three edits at the start are enough: the rest of the story is told
# from a residual stream that nobody touched.

# %%
writes = 1.5 * (x[y == 0].mean(0) - x[y == 1].mean(0))
with dj.session(seed=seed) as s:
    run = tell(s, gloomy)
    edited = []
    for stop in run:
        stop.value[-1] += writes
        edited.append(stop)
    print(prompt, run.text)
    print(f"edited at positions {[stop.position for stop in edited]}; joyful and gloomy words: {moods(run.text)}")
    assert len(edited) < len(fired) / 4 and moods(run.text)[0] > 5 * moods(run.text)[1]

# %% [markdown]
# The first stop, as a notebook shows it; the run has gone on since.

# %%
edited[0]
