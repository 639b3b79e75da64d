"""Pausing an agent for a tool call, and resuming in another process.

An agent writes until it calls a tool. The answer may take hours, so nobody wants to keep a GPU or a process for it:
the session goes into a file, steering and all, and the process may end. Another process, started when the answer is
there, brings it back and goes on, token for token as if nothing had been.
"""

# ruff: noqa: B018 (a cell's last line is shown)

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.bundled import contrast, storyteller

model, tokenizer = storyteller()  # or AutoModelForCausalLM.from_pretrained(...).eval(), AutoTokenizer...
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
pairs, site = contrast(), "resid_post.1"
ends = [
    dj.run_with_cache(list(side), site, positions=-1, logits=False)[1][site] for side in (pairs.joyful, pairs.gloomy)
]
direction = (ends[0] - ends[1]).mean((0, 1))

# %% [markdown]
# ## The agent, until it calls
#
# The storyteller knows no tools, so let it ask what its hero sees: what follows "saw" is to come from outside. The
# token that opens the call is a stop token; an agent of yours has one of its own. This one samples, and is steered on
# its own tokens, to show that both are kept.

# %%
call = tokenizer.encode(" saw")[0]
s = dj.session(seed=7)
s.steer(site, add=direction, strength=1.25, positions="generated")
how: dict[str, Any] = {"max_new_tokens": 100, "do_sample": True, "temperature": 0.7}
asked = s.generate(pairs.gloomy[1], stop_token_ids=[call], **how).result()
print(pairs.gloomy[1] + (asked.text or ""), f"[{asked.finish_reason}]")
assert asked.finish_reason == "stop_token"
s

# %% [markdown]
# ## Into a file
#
# On a GPU `checkpoint()` returns at once and the copy goes on beside other work. `save` takes any address that fsspec
# knows, such as `s3://bucket/agent.safetensors`. From here on this process could end.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "agent.safetensors"
s.checkpoint().save(path)
print(f"{path.stat().st_size / 1024:.0f} KiB for {s.tokens.numel()} tokens")

# %% [markdown]
# ## The other process
#
# It compiles the same model, restores the session, and gives it the tool's answer as the next tokens. The number of
# threads decides how sums are cut, hence bits, so it takes ours; a checkpoint from another environment is refused
# unless `exact=False`.

# %%
program = """
import json, sys
import torch
import djinn_fx as djinn
from djinn_fx.bundled import storyteller

path, answer, how, threads = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model, tokenizer = storyteller()
dj = djinn.compile(model, tokenizer=tokenizer, max_length=128)
with dj.restore(path) as s:
    run = s.generate(answer, **how)
    run.result()
    print(json.dumps({"text": run.text, "tokens": s.tokens.tolist(), "steered": list(s.handles)}))
"""
answer = " a harp"
command = [sys.executable, "-c", program, str(path), answer, json.dumps(how), str(torch.get_num_threads())]
child = subprocess.run(command, capture_output=True, text=True, check=True)
told = json.loads(child.stdout)
print("Then he saw" + answer + told["text"])

# %% [markdown]
# ## As if nothing had been
#
# This process did not end, so it can go on with the same answer and compare: every token is the same.

# %%
run = s.generate(answer, **how)
run.result()
assert told["tokens"] == s.tokens.tolist()
assert told["steered"] == [site]
print("the same", len(told["tokens"]), "tokens:", told["text"] == run.text)
s.close()
folder.cleanup()
