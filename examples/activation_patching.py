"""Activation patching, clean to corrupted, at every layer and position.

Two prompts of the same length; they differ in one name, which the model is about to say. Put one value of the clean run
into the corrupted run: where does that bring the clean answer back? (Causal tracing, Meng et al. 2022; Heimersheim and
Nanda 2024 have the good habits.) Every place is a row of one batch, so the whole map is one forward pass.
"""

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch

import djinn_fx as djinn
from djinn_fx.bundled import storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
clean = "Once upon a time, Ruth lived near the cave with her brother. So"
corrupted = "Once upon a time, Anna lived near the cave with her brother. So"
ids = {name: tokenizer(text)["input_ids"] for name, text in (("clean", clean), ("corrupted", corrupted))}
assert len(ids["clean"]) == len(ids["corrupted"]), "positions must correspond"

# %% [markdown]
# ## The metric
#
# The difference of the two names' logits for the next token, scaled: 0 is the corrupted run, 1 the clean one.

# %%
right, wrong = tokenizer.encode(" Ruth")[0], tokenizer.encode(" Anna")[0]


def gap(logits: torch.Tensor) -> torch.Tensor:
    """Logit of the clean answer minus that of the corrupted one, of logits [..., vocabulary]."""
    return logits[..., right].float() - logits[..., wrong].float()


clean_logits, cache = dj.run_with_cache(clean, ["resid_pre.0", "resid_mid", "resid_post"], logits=1)
corrupted_logits, _ = dj.run_with_cache(corrupted, [], logits=1)
assert clean_logits is not None and corrupted_logits is not None
high, low = float(gap(clean_logits[0, -1])), float(gap(corrupted_logits[0, -1]))
print(f"clean {high:+.1f}, corrupted {low:+.1f}")
assert high > 0 > low, "the model says each prompt's own name"

# %% [markdown]
# ## One row for each place
#
# The batch holds the corrupted prompt once for each (layer, position). The hook of a layer writes into its own rows,
# one position each. The rows do not see each other.

# %%
places = list(cache)  # "resid_pre.0", "resid_mid.0", "resid_post.0", ...: in the order in which they are computed
length = len(ids["corrupted"])


def patch_of(layer: int, name: str) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """A hook that puts the clean value of one layer into that layer's rows, at one position in each."""
    rows, positions = torch.arange(length) + layer * length, torch.arange(length)

    def patch(value: torch.Tensor) -> torch.Tensor:
        value[rows, positions] = cache[name][0]
        return value

    return name, patch


hooks = [patch_of(layer, name) for layer, name in enumerate(places)]
patched = dj.run_with_hooks([ids["corrupted"]] * (len(places) * length), hooks, logits=1)
assert patched is not None
brought_back = ((gap(patched[:, -1]) - low) / (high - low)).reshape(len(places), length)

# %% [markdown]
# ## The map
#
# The name goes by way of the full stop. The first attention (`resid_mid.0`) copies it there, and the later layers
# fetch it from there once the sentence needs a subject: from `resid_mid.2` on it stands at the last position.
# Punctuation as a place where a sentence is summed up is known from larger models too (Tigges et al. 2023).

# %%
words = [tokenizer.decode([token]) for token in ids["corrupted"]]
(differs,) = (index for index, (a, b) in enumerate(zip(*ids.values(), strict=True)) if a != b)
figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
picture = axes.imshow(brought_back.numpy(), vmin=-1, vmax=1, cmap="RdBu", aspect="auto", origin="lower")
axes.set_xticks(range(length), words, rotation=45, ha="right")
axes.get_xticklabels()[differs].set_fontweight("bold")
axes.set_yticks(range(len(places)), places)
figure.colorbar(picture, label="share of the clean answer")
axes.set_title("Clean value put into the corrupted run (bold: the word that differs)", size=10)
plt.show()

# %%
stop = words.index(".")
for layer, name in enumerate(places):
    best = int(brought_back[layer].argmax())
    print(f"{name:13} most at position {best:2} {words[best]!r}: {float(brought_back[layer, best]):.2f}")
assert brought_back[0].argmax() == differs and abs(float(brought_back[0, differs]) - 1) < 1e-3
assert brought_back[places.index("resid_post.0")].argmax() == stop
assert brought_back[-1].argmax() == length - 1 and brought_back[-1, :-1].abs().max() < 1e-3

# %% [markdown]
# ## A batch changes nothing
#
# The same patches one by one, a call each, at a few places.

# %%
for layer, position in ((0, differs), (2, stop), (5, stop)):
    name = places[layer]

    def patch(value: torch.Tensor, name: str = name, position: int = position) -> None:
        value[:, position] = cache[name][:, position]

    alone = dj.run_with_hooks(corrupted, [(name, patch)], logits=1)
    assert alone is not None
    share = float((gap(alone[0, -1]) - low) / (high - low))
    print(f"{name} at {position}: alone {share:.3f}, in the batch {float(brought_back[layer, position]):.3f}")
    assert abs(share - float(brought_back[layer, position])) < 1e-3
