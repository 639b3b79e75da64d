"""Stop inside a model while it generates, look at the activation, edit it, go on.

python examples/stop_and_edit.py
"""

from __future__ import annotations

import djinn_fx as djinn
from djinn_fx.bundled import storyteller


def main() -> None:
    """Turn the residual stream around at one layer, at the third generated token only."""
    model, tokenizer = storyteller()
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=256)
    prompt = "The sky was dark and"
    with dj.session() as s:
        print("untouched:", s.generate(prompt, max_new_tokens=20).result().text)
    with dj.session() as s:
        point = djinn.break_at("resid_post.1", positions="generated", times=3)
        run = s.generate(prompt, max_new_tokens=20, breakpoints=[point])
        for count, stop in enumerate(run, start=1):
            best = dj.unembed(stop.value[-1]).argmax()
            print(f"stopped at {stop.site}, position {stop.position}; it would say {tokenizer.decode([int(best)])!r}")
            if count == 3:
                stop.value.mul_(-1.0)
        print("edited:   ", run.text)


if __name__ == "__main__":
    main()
