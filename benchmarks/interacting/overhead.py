"""Overhead: the same graph with and without instrumentation, sampled in turns.

Five arms decode in lockstep: each round every arm takes the same number of tokens at the same positions from the same
prompt, in rotating order. ``bare`` and ``bare again`` are the same graph compiled without any site; what the interval
of their ratio does not exclude is noise. The others are the instrumented model: nothing armed, a breakpoint at every
layer whose predicate never holds, and neutral edits at every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import djinn_fx as djinn
from djinn_fx.benchmarks import clock
from djinn_fx.benchmarks.answers import Answer, judge, same_bits, tolerance
from djinn_fx.benchmarks.context import refused
from djinn_fx.benchmarks.interacting.bench import Bench
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.stats import overhead, rotated, rounds_overheads, summary

#: What 0.24 % is: the most that the original system measured.
LIMIT = 0.0024

#: A norm that no activation has.
NEVER = 1e30


@dataclass
class Arm:
    """One way to run the same work.

    Attributes:
        dj: compiled with or without sites.
        watching: whether a breakpoint that never fires is set at every layer.
        edited: whether neutral edits are armed at every layer.
        session: open while it decodes.
    """

    dj: Any
    watching: bool = False
    edited: bool = False
    session: Any = None

    def options(self) -> dict[str, Any]:
        """Of each call."""
        point = djinn.break_at("resid_post.*", when=djinn.when.norm_above(NEVER))
        return {"breakpoints": [point]} if self.watching else {}

    def open(self, layers: int, width: int, device: torch.device) -> None:
        """Open the session and arm it."""
        self.session = self.dj.session()
        for layer in range(layers) if self.edited else ():
            self.session.steer(f"resid_post.{layer}", add=torch.zeros(width, device=device))

    def take(self, inputs: Any, count: int, **options: Any) -> Any:
        """Generate so many tokens."""
        run = self.session.generate(inputs, max_new_tokens=count, **self.options(), **options)
        stop = next(run, None)
        assert stop is None, "a breakpoint that cannot fire did"
        return run

    def close(self) -> None:
        """Close the session."""
        if self.session is not None:
            self.session.close()
        self.session = None


def run(bench: Bench) -> dict[str, Json]:
    """Decode and prompt overheads with their intervals."""
    bare = bench.context.compile(bench.loaded, sites=(), max_sessions=2, max_length=bench.room, verify=False)
    try:
        arms = {
            "bare": Arm(bare),
            "bare again": Arm(bare),
            "nothing armed": Arm(bench.dj),
            "watched at every layer": Arm(bench.dj, watching=True),
            "neutral edits at every layer": Arm(bench.dj, edited=True),
        }
        held, detail = _right(bench, arms)
        check = bench.context.check("every arm gives the same answer", held, detail)
        if not check.held:
            return {"decode": refused(check), "prompt": refused(check), "limit": LIMIT}
        found = {"limit": LIMIT, "decode": _compare(bench, arms, _decode(bench, arms))}
        return {**found, "prompt": _compare(bench, arms, _prompts(bench, arms))}
    finally:
        for arm in arms.values():
            arm.close()
        bare.close()


def _opened(bench: Bench, arms: dict[str, Arm]) -> None:
    width = bench.loaded.model.config.get_text_config().hidden_size
    for arm in arms.values():
        arm.close()
        arm.open(bench.loaded.layers, width, bench.device)


def _right(bench: Bench, arms: dict[str, Arm], count: int = 6) -> tuple[bool, str]:
    """Instrumented arms equal each other bit for bit; the bare graph equals them within tolerance."""
    _opened(bench, arms)
    answers = {}
    for name, arm in arms.items():
        result = arm.take(bench.prompt, count, output_logits=True).result()
        answers[name] = Answer(result.tokens[None, len(bench.prompt) :], result.logits[None].cpu())
    reference = answers["nothing armed"]
    assert reference.logits is not None
    for name in ("watched at every layer", "neutral edits at every layer"):
        if not same_bits(answers[name].logits, reference.logits):  # type: ignore[arg-type]
            return False, f"{name}: other bits than nothing armed"
    prompt = torch.tensor([bench.prompt], device=bench.device)
    verdict = judge(reference, answers["bare"], tolerance(bench.loaded, prompt))
    bits = "the same bits" if same_bits(answers["bare"].logits, reference.logits) else verdict.detail  # type: ignore[arg-type]
    return verdict.held, f"bare against instrumented: {bits}"


def _decode(bench: Bench, arms: dict[str, Arm]) -> dict[str, list[float]]:
    """Milliseconds per token, rounds in lockstep."""
    block = bench.context.size(16, 3)
    rounds = bench.context.size(240, 6)
    samples: dict[str, list[float]] = {name: [] for name in arms}
    left = 0
    for turn in range(rounds):
        if left < block:
            _opened(bench, arms)
            for arm in arms.values():
                arm.take(bench.prompt, 1)
                arm.take(None, 2)
            left = bench.room - len(bench.prompt) - 4
        for name in rotated(list(arms), turn):
            taken = clock.seconds(bench.device, lambda arm=arms[name]: arm.take(None, block))  # type: ignore[misc]
            samples[name].append(1e3 * taken / block)
        left -= block
        if bench.context.over:
            break
    return samples


def _prompts(bench: Bench, arms: dict[str, Arm]) -> dict[str, list[float]]:
    """Milliseconds from a prompt to its first token."""
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(bench.context.size(120, 3)):
        for name in rotated(list(arms), turn):
            arm = arms[name]
            arm.close()
            arm.open(bench.loaded.layers, bench.loaded.model.config.get_text_config().hidden_size, bench.device)
            call: Callable[[], Any] = lambda arm=arm: arm.take(bench.prompt, 1)  # type: ignore[misc]  # noqa: E731
            samples[name].append(1e3 * clock.seconds(bench.device, call))
        if bench.context.over:
            break
    return {name: found[1:] for name, found in samples.items()}


def _compare(bench: Bench, arms: dict[str, Arm], samples: dict[str, list[float]]) -> dict[str, Json]:
    """Each arm against bare, with its interval; and how small a difference could be told."""
    base = samples["bare"]
    seed = bench.context.options.seed
    found: dict[str, Json] = {
        name: {
            **summary(values, "ms"),
            "against_bare": overhead(base, values, seed=seed),
            "by_rounds": rounds_overheads(base, values),
        }
        for name, values in samples.items()
    }
    noise = found["bare again"]["against_bare"]
    found["resolution"] = {
        "half_width": noise["half_width"],
        "control_excludes_zero": noise["low"] > 0 or noise["high"] < 0,
        "tells_limit": noise["half_width"] < LIMIT and abs(noise["overhead"]) < LIMIT,
    }
    return found
