"""Finding the first NaN.

A model in half precision writes nonsense. Which module is the first to make a value that is not finite, at which token, and does the
story go on if that one value is repaired? Every site of the model is looked at, compiled in or not.
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
# The fault is planted, of a kind that is met: one neuron of one layer writes so much that it leaves the range of float16
# (65,504). In float32 nothing is seen of it but odd text.

# %%
mlp = model.transformer.h[2].mlp
neuron = 17
with torch.no_grad():
    mlp.c_fc.weight[:, neuron] *= 40
    mlp.c_proj.weight[neuron] *= 2000
assert torch.isfinite(model(**tokenizer(prompts[0], return_tensors="pt")).logits).all()
model.half()

# %% [markdown]
# `compile` measures the model on a probe, and says so if the model's own numbers are not finite. The receipt keeps it.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=128, sites=["mlp_out", "resid_post"])
print(*(str(warning.message) for warning in caught), sep="\n")
assert dj.receipt is not None and dj.receipt.nonfinite
dj.receipt
