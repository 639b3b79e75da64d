"""Activation patching, clean to corrupted, at every layer and position.

Two prompts of the same length; the clean one tells a joyful story, the corrupted one a gloomy story. Put one value of
the clean run into the corrupted run: where does that bring the clean answer back? (Causal tracing, Meng et al. 2022;
Heimersheim and Nanda 2024 have the good habits.) Every place is a row of one batch, so the whole map is one forward
pass.
"""

# %%
import matplotlib.pyplot as plt
import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
ends = " The sky above the slopes was"
clean, corrupted = contrast().joyful[0] + ends, contrast().gloomy[0] + ends
ids = {name: tokenizer(text)["input_ids"] for name, text in (("clean", clean), ("corrupted", corrupted))}
assert len(ids["clean"]) == len(ids["corrupted"]), "positions must correspond"
print(clean)
print(corrupted)

# %% [markdown]
# ## The metric
#
# The log odds of a joyful word against a gloomy one as the next token, scaled: 0 is the corrupted run, 1 the clean
# one.


# %%
def token_ids(words: frozenset[str]) -> torch.Tensor:
    """The ids of words, each with the space before it."""
    return torch.tensor(sorted(tokenizer.encode(f" {word}")[0] for word in words))


joyful, gloomy = token_ids(contrast().joyful_words), token_ids(contrast().gloomy_words)


def odds(logits: torch.Tensor) -> torch.Tensor:
    """Log odds of joyful against gloomy, of logits [..., vocabulary]."""
    log_p = logits.float().log_softmax(-1)
    return log_p[..., joyful].logsumexp(-1) - log_p[..., gloomy].logsumexp(-1)


clean_logits, cache = dj.run_with_cache(clean, ["resid_pre.0", "resid_mid", "resid_post"], logits=1)
corrupted_logits, _ = dj.run_with_cache(corrupted, [], logits=1)
assert clean_logits is not None and corrupted_logits is not None
high, low = float(odds(clean_logits[0, -1])), float(odds(corrupted_logits[0, -1]))
print(f"clean {high:+.1f}, corrupted {low:+.1f} (log odds)")

# %% [markdown]
# ## One row for each place
#
# The batch holds the corrupted prompt once for each (layer, position). The hook of a layer writes into its own rows,
# one position each. The rows do not see each other.

# %%
places = list(cache)  # "resid_pre.0", "resid_mid.0", "resid_post.0", ...: in the order in which they are computed
length = len(ids["corrupted"])


def patch_of(layer: int, name: str) -> tuple[str, object]:
    """A hook that puts the clean value of one layer into that layer's rows, at one position in each."""
    rows, positions = torch.arange(length) + layer * length, torch.arange(length)

    def patch(value: torch.Tensor) -> torch.Tensor:
        value[rows, positions] = cache[name][0]
        return value

    return name, patch


hooks = [patch_of(layer, name) for layer, name in enumerate(places)]
patched = dj.run_with_hooks([ids["corrupted"]] * (len(places) * length), hooks, logits=1)
assert patched is not None
brought_back = ((odds(patched[:, -1]) - low) / (high - low)).reshape(len(places), length)

# %% [markdown]
# ## The map
#
# At the bottom only the two words that differ carry the mood, the later one nearly all of it. The very first
# attention (`resid_mid.0`) copies it to the last position; from there on a patch further back comes too late.

# %%
words = [tokenizer.decode([token]) for token in ids["corrupted"]]
differ = [index for index, (a, b) in enumerate(zip(*ids.values(), strict=True)) if a != b]
figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
picture = axes.imshow(brought_back, vmin=-1, vmax=1, cmap="RdBu", aspect="auto", origin="lower")
axes.set_xticks(range(length), words, rotation=45, ha="right")
for index in differ:
    axes.get_xticklabels()[index].set_fontweight("bold")
axes.set_yticks(range(len(places)), places)
figure.colorbar(picture, label="share of the clean answer")
axes.set_title("Clean value put into the corrupted run (bold: the words that differ)", size=10)
plt.show()

# %%
first, last = brought_back[0], brought_back[-1]
same = [index for index in range(length) if index not in differ]
assert first[same].abs().max() < 1e-3, "where the prompts agree, nothing is brought back at the bottom"
assert abs(float(last[-1]) - 1) < 1e-3 and last[:-1].abs().max() < 1e-3, "at the top all of it is at the end"
for layer, name in enumerate(places):
    best = int(brought_back[layer].argmax())
    print(f"{name:13} most at position {best:2} {words[best]!r}: {float(brought_back[layer, best]):.2f}")

# %% [markdown]
# ## A batch changes nothing
#
# The same patches one by one, a call each, at a few places.

# %%
for layer, position in ((0, differ[0]), (0, differ[1]), (3, length - 1)):
    name = places[layer]

    def patch(value: torch.Tensor, name: str = name, position: int = position) -> None:
        value[:, position] = cache[name][:, position]

    alone = dj.run_with_hooks(corrupted, [(name, patch)], logits=1)
    assert alone is not None
    share = float((odds(alone[0, -1]) - low) / (high - low))
    print(f"{name} at {position}: alone {share:.3f}, in the batch {float(brought_back[layer, position]):.3f}")
    assert abs(share - float(brought_back[layer, position])) < 1e-3
