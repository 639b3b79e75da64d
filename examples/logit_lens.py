"""Logit lens over all layers.

At each layer and position: what would the model say if it ended here? One forward pass keeps the residual stream of
every layer, and one call turns all of it into predictions (nostalgebraist 2020).
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import matplotlib.pyplot as plt

import djinn_fx as djinn
from djinn_fx.bundled import storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
prompt = "It was a grey morning, and Mara felt sad. The sky above the slopes was"

# %% [markdown]
# ## Every layer in one pass
#
# `run_with_cache` returns the logits and a cache of the sites asked for; `resid_post` means that of every layer. A
# cache shows itself in a notebook: shapes, bytes, and the norm over the positions.

# %%
logits, cache = dj.run_with_cache(prompt, "resid_post")
cache

# %% [markdown]
# `stack` puts the layers into one tensor, `unembed` is the model's own tail: final norm, head, and whatever scales it
# has.

# %%
residuals = cache.stack("resid_post")[:, 0]  # [layers, positions, hidden]
lens = dj.unembed(residuals).float().softmax(-1)  # [layers, positions, vocabulary]

words = [tokenizer.decode([token]) for token in tokenizer(prompt)["input_ids"]]
for layer, at_layer in enumerate(lens[:, -1]):
    best = at_layer.topk(4)
    said = [f"{tokenizer.decode([int(t)])!r} {p:.0%}" for p, t in zip(best.values, best.indices, strict=True)]
    print(f"layer {layer} after {words[-1]!r}:", ", ".join(said))

# %% [markdown]
# At the last layer nothing is left to come, so the lens is the model's own prediction.

# %%
assert logits is not None
assert (lens[-1] - logits[0].float().softmax(-1)).abs().max() < 1e-5

# %% [markdown]
# ## The whole picture
#
# Each cell: the likeliest next token there, and how likely. The later layers mostly sharpen what an early one has
# found; where the story has several ways to go on, as after "was", the last layers share the probability out.

# %%
best = lens.max(-1)
figure, axes = plt.subplots(figsize=(13, 3.2), layout="constrained")
picture = axes.imshow(best.values.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
for layer, row in enumerate(best.indices.tolist()):
    for position, token in enumerate(row):
        ink = "white" if best.values[layer, position] > 0.6 else "black"
        axes.text(position, layer, tokenizer.decode([token]).strip(), ha="center", va="center", size=8, color=ink)
axes.set_xticks(range(len(words)), words, rotation=45, ha="right")
axes.set_yticks(range(len(lens)), [f"resid_post.{layer}" for layer in range(len(lens))])
figure.colorbar(picture, label="probability")
plt.show()

# %% [markdown]
# ## How far each layer still has to go
#
# The divergence from each layer's prediction to the model's own, in nats, averaged over the positions.

# %%
gap = (lens[-1] * (lens[-1].clamp_min(1e-12).log() - lens.clamp_min(1e-12).log())).sum(-1).mean(-1)
for layer, nats in enumerate(gap.tolist()):
    print(f"layer {layer}: {nats:.3f} nats")
assert bool((gap.diff() < 0).all()), "each layer comes closer"
