"""A second process: restore checkpoints, go on, print what came out as one line of JSON.

Its arguments are a model's folder and checkpoint files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from djinn_fx.runtime.run import Run
from tests.bits import bits
from tests.runtime.checkpoint_cases import edit, finish, run_of, small_dj


def outcome(run: Run) -> list[Any]:
    """Where a run stops from here on, its tokens, and a digest of every bit it shows."""
    passed = finish(run, edit)
    assert passed.result.logits is not None
    shown = [*passed.values, passed.result.logits, passed.result.cache["resid_post.1"]]
    digest = hashlib.sha256(b"".join(bits(tensor).numpy().tobytes() for tensor in shown)).hexdigest()
    places = [[site, position, list(fired)] for site, position, fired in passed.places]
    return [places, passed.result.tokens.tolist(), digest]


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
    dj = small_dj(model, sites="resid_post")
    print(json.dumps([outcome(run_of(dj.restore(path))) for path in sys.argv[2:]]))
