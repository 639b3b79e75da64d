"""A child of ``compile``: makes a model, compiles it one way, and says how long the first tokens took.

python -m djinn_fx.benchmarks.compile_child --kind djinn --model gpt2 --layers 4 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from djinn_fx.benchmarks import clock, models
from djinn_fx.benchmarks.answers import Answer, Work, judge, tolerance
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.peers.hooks import HooksDecoder
from djinn_fx.benchmarks.record import Json

#: Tokens whose logits are compared.
COMPARED = 3


def djinn_times(loaded: Loaded, prompt: list[int], backend: str) -> tuple[dict[str, Json], Answer]:
    """Seconds until ``djinn.compile`` returns, until the first token and until the second."""
    import djinn_fx as djinn

    room = min(loaded.room, len(prompt) + 64)
    stamps: list[float] = []
    start = time.perf_counter()
    with djinn.compile(loaded.model, backend=backend, max_length=room) as dj, dj.session() as session:
        compiled = time.perf_counter() - start
        run = session.generate(
            prompt,
            max_new_tokens=COMPARED,
            output_logits=True,
            on_token=lambda token: stamps.append(time.perf_counter() - start),
        )
        result = run.result()
        assert result.logits is not None
        answer = Answer(result.tokens[None, len(prompt) :], result.logits[None].cpu())
    return {"compile_s": compiled, "first_s": stamps[0], "second_s": stamps[1]}, answer


def whole_times(loaded: Loaded, prompt: torch.Tensor) -> tuple[dict[str, Json], Answer]:
    """The same for the whole forward under ``torch.compile`` over a static cache, prompt and steps."""
    from transformers import StaticCache

    model, room = loaded.model, min(loaded.room, prompt.shape[1] + 64)
    cache = StaticCache(config=model.config, max_cache_len=room)
    # Made inside a compiled prompt it would have no fixed address, and CUDA graphs would be left out.
    cache.early_initialization(1, *loaded.kv_shape, next(model.parameters()).dtype, loaded.device)

    def forward(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        out = model(input_ids=tokens, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    mode = "reduce-overhead" if loaded.device.type == "cuda" else "default"
    # Two compilations, one a shape: compiling for any length at once would slow the steps down.
    first = torch.compile(forward, fullgraph=True, dynamic=False)
    step = torch.compile(lambda tokens, places: forward(tokens, places), fullgraph=True, dynamic=False, mode=mode)
    stamps, logits = [], []
    start = time.perf_counter()
    last = first(prompt, torch.arange(prompt.shape[1], device=prompt.device)[None])
    for index in range(COMPARED):
        token = last.argmax(-1, keepdim=True)
        logits.append(last.float().cpu())
        stamps.append(time.perf_counter() - start)
        if index + 1 < COMPARED:
            place = torch.full_like(token, prompt.shape[1] + index)
            last = step(token, place).clone()
            clock.synchronize(loaded.device)
    stacked = torch.stack(logits, 1)
    return {"compile_s": None, "first_s": stamps[0], "second_s": stamps[1]}, Answer(stacked.argmax(-1), stacked)


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("djinn", "whole"), required=True)
    for name in ("model", "device", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", type=int, default=512)
    chosen = parser.parse_args()
    with torch.no_grad():
        device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
        loaded = models.load(chosen.model, device, dtype, chosen.seed, chosen.layers)
        prompt = loaded.prompts(1, min(chosen.prompt, loaded.room // 2), chosen.seed)
        reference = HooksDecoder(loaded)
        right = reference.answer(prompt, Work("plain"), COMPARED)  # the device is warm after it
        reference.close()
        clock.synchronize(device)
        if chosen.kind == "djinn":
            found, answer = djinn_times(loaded, prompt[0].tolist(), chosen.backend)
        else:
            found, answer = whole_times(loaded, prompt)
        verdict = judge(right, answer, tolerance(loaded, prompt))
    print(json.dumps({**found, "held": verdict.held, "detail": verdict.detail}))


if __name__ == "__main__":
    main()
