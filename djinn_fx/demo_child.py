"""The demo's second process: restore a checkpoint, go on to the end, print the tokens as JSON."""

from __future__ import annotations

import json
import os
import sys

import torch

from djinn_fx import bundled
from djinn_fx.api import compile as djinn_compile
from djinn_fx.demo import _length


def main(path: str, reference: str) -> None:
    """Restore ``path`` into a fresh compilation of ``reference`` and finish its run."""
    torch.set_num_threads(int(os.environ.get("DJINN_DEMO_THREADS", torch.get_num_threads())))
    model, tokenizer = bundled.load(reference)
    if torch.cuda.is_available():
        model = model.to("cuda")
    dj = djinn_compile(model, tokenizer=tokenizer, max_length=_length(model), prefill_chunk=64, verify=False)
    with dj.restore(path) as session:
        run = session.run
        assert run is not None
        print(json.dumps(run.result().tokens.tolist()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
