"""What the parts of ``interactivity`` share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.models import Loaded
from djinn_fx.benchmarks.record import Json

#: The breakpoints of the original experiment, of 12 layers.
LAYERS, OF = (3, 6, 9), 12


@dataclass
class Bench:
    """A compiled model, a prompt, and the uninterrupted answer to it.

    Attributes:
        context: the run.
        loaded: the model.
        dj: compiled.
        prompt: tokens of the one prompt.
        layers: where the breakpoints are.
        trials: at each.
        whole: logits ``[tokens, vocab]`` of the uninterrupted forward.
        compile_seconds: that ``djinn.compile`` took.
        room: positions that a session has.
        first: the first stop's times.
    """

    context: Context
    loaded: Loaded
    dj: Any
    prompt: list[int]
    layers: tuple[int, ...]
    trials: int
    whole: torch.Tensor
    compile_seconds: float
    room: int
    first: dict[str, float]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.loaded.device

    @property
    def middle(self) -> int:
        """The layer of steering and pausing, the original's 6."""
        return self.layers[len(self.layers) // 2]

    def site(self, layer: int) -> str:
        """The name of a block's output."""
        return f"resid_post.{layer}"

    def setting(self) -> dict[str, Json]:
        """What the parts have in common."""
        return {
            "tokens": len(self.prompt),
            "batch": 1,
            "layers": list(self.layers),
            "model_layers": self.loaded.layers,
            "trials": self.trials,
            "compile_seconds": round(self.compile_seconds, 3),
            "receipt": str(self.dj.receipt),
            "weight_bytes": self.loaded.weight_bytes,
        }

    def sync(self) -> None:
        """Wait for the device."""
        clock.synchronize(self.device)

    def to_stop(self, session: Any, layer: int) -> tuple[Any, Any, float]:
        """Forward the prompt up to a layer: the run, the stop, and the seconds until its value can be read."""
        self.sync()
        start = time.perf_counter()
        run = session.forward(self.prompt, breakpoints=[self.site(layer)])
        stop = next(run)
        self.sync()
        return run, stop, time.perf_counter() - start


def chosen(loaded: Loaded) -> tuple[int, ...]:
    """The original's layers, at the same depth in a model that is not 12 layers deep."""
    return tuple(dict.fromkeys(min(loaded.layers - 1, layer * loaded.layers // OF) for layer in LAYERS))


def open_bench(context: Context) -> Bench:
    """Load and compile; the first stop is timed before anything else ran."""
    loaded = context.load()
    cuda = context.device.type == "cuda"
    length = min(512, loaded.room // 2) if cuda or not context.options.quick else min(32, loaded.room // 3)
    prompt = loaded.prompts(1, length, context.options.seed)[0].tolist()
    # On CUDA as many sessions and positions as checkpoint and endurance have: Inductor's cache then serves all three.
    room = min(loaded.room, 2 * length if cuda else length + 256)
    started = time.perf_counter()
    dj = context.compile(loaded, max_sessions=4, max_length=room)
    compiled = time.perf_counter() - started
    context.say(f"compiled in {compiled:.1f} s")
    context.say(str(dj.receipt))
    layers = chosen(loaded)
    bench = Bench(context, loaded, dj, prompt, layers, 3, torch.empty(0), compiled, room, {})
    with dj.session() as session:
        run, _, seconds = bench.to_stop(session, layers[0])
        run.run_to_end()
    bench.first = {"stop_ms": 1e3 * seconds, "with_compile_s": compiled + seconds}
    with dj.session() as session:
        bench.whole = session.forward(prompt).result().logits.clone()
    return bench
