"""Serve a second request while the first is paused inside a forward pass.

python examples/pause_and_serve.py
"""

from __future__ import annotations

import torch

import djinn_fx as djinn
from djinn_fx.bundled import storyteller


def main() -> None:
    """Pause A at a layer, run B from start to end, resume A; compare with A undisturbed."""
    model, tokenizer = storyteller()
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=256)
    with dj.session() as alone:
        expected = alone.generate("Anna walked to the", max_new_tokens=16).result().tokens
    with dj.session() as a, dj.session() as b:
        run = a.generate("Anna walked to the", max_new_tokens=16, breakpoints=["resid_post.1"])
        stop = next(run)
        print(f"A is paused at {stop.site}, position {stop.position}")
        print("B says:", b.generate("The wind was", max_new_tokens=16).result().text)
        print("A says:", run.result().text)
        print("A is what it would have been:", torch.equal(run.tokens, expected))


if __name__ == "__main__":
    main()
