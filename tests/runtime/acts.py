"""What the state machine may do: prompts, breakpoints, edits, values, drawn by hypothesis from a few small lists."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.runtime.sampling import SamplingSpec
from djinn_fx.runtime.stop import Stop
from tests.families import LENGTH, VOCAB, WIDTH, noise, prompt
from tests.oracle import Call

#: Sites compiled at first, and those that ``add_sites`` adds: one of them lives across a site compiled at first.
SITES = ("resid_post", "attn_q.1", "logits")
MORE = ("attn_v.1", "mlp_out.0")
NAMES = ("resid_post.0", "attn_q.1", "resid_post.1", "logits")

#: More bytes than what a stop shows, and what its step had left there, of any site.
LARGEST = 2 * LENGTH * VOCAB * 4

_WORDS: tuple[Any, ...] = ("prompt", "generated", "last_prompt", ("prompt", "generated"), ["last_prompt"])
_PLACES: tuple[Any, ...] = (0, 3, 10, slice(2, 12), slice(5, None), [0, 4, 8, 13])
POSITIONS = st.sampled_from((*("all",) * 6, *_WORDS, *_PLACES))
PICK = st.integers(0, 6)
SEEDS = st.integers(0, 3)
SAMPLING = st.sampled_from(
    (SamplingSpec(), SamplingSpec(True), SamplingSpec(True, 0.7, top_k=8), SamplingSpec(True, 1.5, top_p=0.9))
)
STRENGTHS = st.sampled_from((1.0, 1.0, 0.5, 2.0, -1.0, 0.0))
#: What follows an act.
THEN = st.sampled_from(("stay", "stay", "advance", "end"))


class Moody:
    """A predicate of the user's own, which no file can hold, and which raises when it is told to."""

    fails = False

    def __call__(self, h: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("not today")
        return h.flatten()[0] > 0


MOODY = Moody()


@st.composite
def calls(draw: st.DrawFn, least: int = 0) -> Call:
    """A forward or a generate call; prompts cross chunks now and then."""
    kind = draw(st.sampled_from(("generate", "generate", "forward")))
    tokens = prompt(draw(SEEDS), max(least, draw(st.sampled_from((9, 3, 0, 0, 1, 8, 12, 18)))))
    if kind == "forward":
        return Call("forward", tokens or (5,))
    ends = frozenset(draw(st.sampled_from(((), (), range(3, 20)))))
    return Call("generate", tokens, draw(st.integers(1, 6)), draw(SAMPLING), ends)


@st.composite
def breakpoints(draw: st.DrawFn) -> djinn.Breakpoint:
    """A breakpoint at one of the sites compiled at first."""
    site = draw(st.sampled_from((*NAMES, "resid_post.*")))
    kinds = ("norm", "token", "nonfinite", "probe", "entropy", "own", "own")
    kind = draw(st.sampled_from((*("always",) * 6, *kinds)))
    whens: dict[str, Any] = {
        "always": None,
        "norm": djinn.when.norm_above(draw(st.sampled_from((4.0, 8.0, 12.0)))),
        "token": djinn.when.token(draw(st.integers(3, 9))),
        "nonfinite": djinn.when.nonfinite(),
        "probe": djinn.when.probe(noise(draw(SEEDS), VOCAB if site == "logits" else WIDTH)),
        "entropy": djinn.when.entropy_below(2.0),
        "own": MOODY,
    }
    return djinn.break_at(site, whens[kind], positions=draw(POSITIONS), times=draw(st.sampled_from((None, None, 1, 2))))


@st.composite
def edits(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of an Edit, its vectors as functions of the width."""
    kind = draw(st.sampled_from(("scale", "scale", "add", "vector", "ablate", "span", "feature", "clamp", "all")))
    return {
        "kind": kind,
        "seed": draw(SEEDS),
        "strength": draw(STRENGTHS),
        "positions": draw(POSITIONS),
        "factor": draw(st.sampled_from((0.9, 0.0, -1.0, 1.5))),
    }


def make_edit(site: str, size: int, *, kind: str, seed: int, strength: float, positions: Any, factor: float) -> Any:
    """The Edit that :func:`edits` described, for a site of this width."""
    directions = {"ablate": noise(seed, size), "span": noise(seed, 2, size), "all": noise(seed, size)}
    read, write = noise(seed + 1, size) / 4, noise(seed + 2, size) / 4
    features = {
        "feature": djinn.Feature(read, write, bias=0.2, act="relu", set=factor),
        "clamp": djinn.Feature(read, write, act="jumprelu", threshold=0.5, min=-0.2, max=factor + 1),
        "all": djinn.Feature(read, write, min=0.5),
    }
    scale: float | Tensor = factor if kind in ("scale", "all") else 1.0
    return djinn.Edit(
        site,
        scale=noise(seed, size) if kind == "vector" else scale,
        add=noise(seed, size) if kind in ("add", "all") else None,
        ablate=directions.get(kind),
        feature=features.get(kind),
        strength=strength,
        positions=positions,
    )


WRITES = st.sampled_from(("scale", "assign", "negate", "row", "nan", "inf", "-0.0", "same", "undo"))

#: What is written before another act at the same stop.
TOUCH = st.sampled_from((None, None, "assign", "same"))


def write(stop: Stop, kind: str, seed: int, natural: Tensor) -> None:
    """Change what a stop holds, in place or by assignment."""
    flat = stop.value.view(-1)
    special = {"nan": float("nan"), "inf": -float("inf") if seed % 2 else float("inf"), "-0.0": -0.0}
    if kind == "scale":
        stop.value.mul_(1.5)
    elif kind == "assign":
        stop.value = stop.value + noise(seed, *stop.value.shape).to(stop.value)
    elif kind == "negate":
        stop.value.neg_()
    elif kind == "row":
        stop.value[seed % len(stop.value)] = 0.0
    elif kind in special:
        flat[torch.arange(seed, flat.numel(), 17 + seed)] = special[kind]
    elif kind == "same":
        stop.value = stop.value.clone()
    else:
        stop.value = natural.clone()
