"""Finding the first NaN.

A model in half precision writes nonsense. Which module is the first to make a value that is not finite, at which
token, by which neuron? Then: stop where it happens, go back to just before, silence the neuron, and go on.
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import warnings

import torch

import djinn_fx as djinn
from djinn_fx.bundled import storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
prompts = ["It was a bright morning, and Mara felt happy.", "The sky was dark and"]

# %% [markdown]
# ## A broken model
#
# The fault is planted, of a kind that is met: where one neuron of one layer is active, it leaves the range of float16
# (65,504). In float32 every number is finite.

# %%
neuron = 17
with torch.no_grad():
    model.get_parameter("transformer.h.2.mlp.c_fc.weight")[:, neuron] *= 2000
    model.get_parameter("transformer.h.2.mlp.c_proj.weight")[neuron] *= 2000
assert all(torch.isfinite(model(**tokenizer(prompt, return_tensors="pt")).logits).all() for prompt in prompts)
model = model.half()

# %% [markdown]
# `compile` measures the model on a probe, and says so if the model's own numbers are not finite. The receipt keeps
# it.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, sites=["resid_post", "mlp_act", "mlp_out"])
print(*(str(warning.message) for warning in caught), sep="\n")
assert dj.receipt is not None and dj.receipt.nonfinite
dj.receipt

# %% [markdown]
# ## Where
#
# All sites of all prompts in one pass, in the order in which they are computed, whether compiled in or not. For many
# prompts the places are (row, position).

# %%
found = dj.first_nonfinite(prompts)
assert found is not None
site, places = found
row, position = places[0]
words = [tokenizer.decode([token]) for token in tokenizer(prompts[row])["input_ids"]]
print(f"{site}, prompt {row}, position {position} {words[position]!r}; {len(places)} place(s) in all")
assert site == "mlp_out.2"
assert dj.first_nonfinite(prompts[0]) is None, "the other prompt is fine, so far"

# %% [markdown]
# ## Why
#
# What went into that module at that place is still finite; one neuron is far above the rest.

# %%
act = dj.run_with_cache(prompts[row], "mlp_act.2", positions=position, logits=False)[1]["mlp_act.2"][0, 0].float()
largest = act.abs().topk(2)
culprit = int(largest.indices[0])
print(f"neuron {culprit}: {act[culprit]:.0f}; the next largest has {largest.values[1]:.1f}")
assert culprit == neuron and torch.isfinite(act).all()

# %% [markdown]
# ## In the middle of a story
#
# The first prompt is fine, but what the model makes of it is not. A breakpoint with `when.nonfinite()` stops at the
# very token.

# %%
s = dj.session()
bad = djinn.break_at("mlp_out.*", when=djinn.when.nonfinite())
run = s.generate(prompts[0], max_new_tokens=40, breakpoints=[bad], output_logits=True)
stop = next(run)
print(f"{stop.site}, position {stop.position}, after {run.text!r}")
stop

# %% [markdown]
# ## Back, and on
#
# Rewound to the layer before, in the same step: nothing of the bad value was kept. There the neuron is switched off
# from here on, and the story goes to its end.

# %%
run.rewind(position=stop.position, site="resid_post.1")
mask = torch.ones(dj.sites.get("mlp_act.2").width)
mask[culprit] = 0.0
s.steer("mlp_act.2", scale=mask)
assert next(run, None) is None, "no stop any more"
print(prompts[0], run.text)
logits = run.result().logits
assert logits is not None and torch.isfinite(logits).all()
s.close()
