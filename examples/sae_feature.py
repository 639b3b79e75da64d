"""An SAE feature, clamped in the graph.

A small sparse autoencoder is trained on a layer's activations, in seconds. One of its features stands for the mood.
Clamped, it holds its value at every token, inside the compiled graph: no hook, no stop, and only the feature's own
part of the activation changes, so the autoencoder's reconstruction error stays in (Templeton et al. 2024 clamp
features in this way).
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

torch.manual_seed(0)
model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, max_sessions=32)
pairs, site = contrast(), "resid_post.1"

# %% [markdown]
# ## Activations
#
# Sampled stories, captured while they are told. For a model of your size: `examples/harvest.py`.

# %%
prompts = [*pairs.joyful, *pairs.gloomy, *pairs.neutral]
stories = dj.generate(prompts, max_new_tokens=60, do_sample=True, capture=[site])
x = torch.cat([story.cache[site][1:] for story in stories])  # the first position is like no other
mean, scale = x.mean(0), x.std()
print(f"{len(x)} activations of width {x.shape[1]}")

# %% [markdown]
# ## The autoencoder
#
# Encoder, ReLU, decoder of unit columns; squared error and an L1 penalty.

# %%
width, count = x.shape[1], 256
encoder = torch.nn.Linear(width, count)
decoder = torch.nn.Linear(count, width)
with torch.no_grad():
    decoder.weight /= decoder.weight.norm(dim=0)
    encoder.weight.copy_(decoder.weight.T)
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
for _ in range(400):
    batch = (x[torch.randint(len(x), (256,))] - mean) / scale
    features = encoder(batch).relu()
    loss = (decoder(features) - batch).square().sum(-1).mean() + 1.0 * features.sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        decoder.weight /= decoder.weight.norm(dim=0)

with torch.no_grad():
    features = encoder((x - mean) / scale).relu()
    error = (decoder(features) * scale + mean - x).square().sum() / (x - mean).square().sum()
active = float((features > 0).float().sum(-1).mean())
print(f"{1 - error:.0%} of the variance explained with {active:.0f} of {count} features at a time")
assert error < 0.2

# %% [markdown]
# ## The feature of the mood
#
# The one that tells joyful prompts from gloomy ones best, at their last tokens.

# %%
ends = [
    dj.run_with_cache(list(side), site, positions=-1, logits=False)[1][site][:, 0]
    for side in (pairs.joyful, pairs.gloomy)
]
with torch.no_grad():
    joyful, gloomy = (encoder((end - mean) / scale).relu() for end in ends)
apart = (joyful.mean(0) - gloomy.mean(0)) / (joyful.std(0) + gloomy.std(0) + 0.1)
chosen = int(apart.argmax())
print(
    f"feature {chosen}: {joyful[:, chosen].mean():.2f} on joyful prompts, {gloomy[:, chosen].mean():.2f} on gloomy ones"
)

# %% [markdown]
# ## Clamped
#
# A `Feature` has what the autoencoder knows of it, in the model's own units: the encoder's row and bias, the
# decoder's column, the activation. `set=` gives it one value at every token; `min=` and `max=` bound it.

# %%
read = encoder.weight.detach()[chosen] / scale
write = decoder.weight.detach()[:, chosen] * scale
bias = float(encoder.bias.detach()[chosen] - read @ mean)


def clamp(value: float) -> djinn.Edit:
    """The edit that holds the feature at a value."""
    return djinn.Edit(site, feature=djinn.Feature(read=read, write=write, bias=bias, act="relu", set=value))


def moods(text: str | None) -> tuple[int, int]:
    """How many joyful and how many gloomy words."""
    said = [word.strip(".,!?\"'").lower() for word in (text or "").split()]
    return sum(word in pairs.joyful_words for word in said), sum(word in pairs.gloomy_words for word in said)


at_most = float(features[:, chosen].max())
print(f"by itself the feature goes up to {at_most:.1f}")
values, told = (0.0, 4.0, 6.0), pairs.gloomy[:8]
results = dj.generate(
    [*told * len(values)], max_new_tokens=40, edits=[[clamp(value)] for value in values for _ in told]
)
counts = {}
for index, value in enumerate(values):
    texts = [result.text for result in results[len(told) * index : len(told) * (index + 1)]]
    counts[value] = tuple(map(sum, zip(*map(moods, texts), strict=True)))
    print(f"held at {value}: {counts[value][0]} joyful words, {counts[value][1]} gloomy ones in {len(told)} stories")
    print("    ", told[0], (texts[0] or "").strip()[:90])
assert counts[0.0][0] == 0 and counts[6.0][0] > 9 * counts[6.0][1]

# %% [markdown]
# ## What exactly changed
#
# With `p` the feature before and 6 after, the activation becomes `h + (6 - p) * write`, and nothing else.

# %%
prompt = pairs.gloomy[0]
h = dj.run_with_cache(prompt, site, logits=False)[1][site][0]
with dj.session() as s:
    s.steer(clamp(6.0))
    result = s.generate(prompt, max_new_tokens=1, capture=[site]).result()
after = result.cache[site][: len(h)]
p = (h @ read + bias).relu()
torch.testing.assert_close(after, h + (6.0 - p)[:, None] * write, atol=1e-4, rtol=1e-4)
result.cache
