"""Answers: what a system computed, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from djinn_fx.benchmarks.models import Loaded
from djinn_fx.errors import InvalidValue

#: Positions at which a model's noise is measured.
POSITIONS = 64


@dataclass(frozen=True, eq=False)
class Work:
    """What is done to the activations while tokens are computed.

    Attributes:
        name: in tables.
        scale: factor on the output of a block, by layer.
        ablate: unit directions ``[k, hidden]`` projected out of the output of a block, by layer.
        read: layers whose output the caller receives on the host at every step.
    """

    name: str
    scale: Mapping[int, float] = field(default_factory=dict)
    ablate: Mapping[int, torch.Tensor] = field(default_factory=dict)
    read: tuple[int, ...] = ()

    @property
    def edits(self) -> bool:
        """Whether it changes the answer."""
        return bool(self.scale or self.ablate)


@dataclass(frozen=True, eq=False)
class Answer:
    """Greedy tokens of some rows, and the logits that they were chosen from.

    Attributes:
        tokens: ``[rows, steps]`` on the CPU.
        logits: ``[rows, steps, vocab]`` on the CPU; None from a system that does not give them.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Judgement:
    """Whether an answer equals a reference, and in what figures.

    Attributes:
        held: whether it does.
        detail: how far off it is.
    """

    held: bool
    detail: str


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference over that of ``b``, each row of logits less its mean."""
    first, second = (t.detach().float() - t.detach().float().mean(-1, keepdim=True) for t in (a, b))
    size = float(second.pow(2).mean().sqrt())
    return float((first - second).pow(2).mean().sqrt()) / max(size, 1e-30)


def tolerance(loaded: Loaded, prompts: torch.Tensor) -> float:
    """How far two right answers may be apart: four times the model's own attention noise.

    The noise is the largest distance between Hugging Face's ``sdpa`` and ``eager`` attention at the prompts' last
    positions; four units in the last place of the weights' dtype at least.

    Raises:
        InvalidValue: the model's logits are not finite, so no answer can be compared.
    """
    model = loaded.model
    before = model.config._attn_implementation
    found = []
    try:
        for kind in ("sdpa", "eager"):
            model.set_attn_implementation(kind)
            found.append(model(input_ids=prompts, logits_to_keep=POSITIONS, use_cache=False).logits)
    finally:
        model.set_attn_implementation(before)
    dtype = next(model.parameters()).dtype
    if not all(bool(torch.isfinite(logits).all()) for logits in found):
        raise InvalidValue(
            f"{loaded.name} in {str(dtype).removeprefix('torch.')} gives logits that are not finite, so no answer can "
            "be compared: give another --dtype or --model."
        )
    floor = 4 * torch.finfo(dtype).eps
    pairs = zip(found[0].flatten(0, 1), found[1].flatten(0, 1), strict=True)
    return max(4 * max(distance(a, b) for a, b in pairs), floor)


def judge(reference: Answer, found: Answer, allowed: float, ignored: Answer | None = None) -> Judgement:
    """Compare an answer with the reference, step by step, up to where greedy choices part.

    Where the tokens part, the reference must hold the two for as good as equal; after that the rows have different
    pasts and are not compared.

    Args:
        reference: the right answer.
        found: the one to judge.
        allowed: the tolerance.
        ignored: the answer without the edits; one that is nearer to it shows that they were silently ignored.
    """
    if found.tokens.shape != reference.tokens.shape:
        return Judgement(False, f"{tuple(found.tokens.shape)} tokens instead of {tuple(reference.tokens.shape)}")
    if found.logits is not None and not bool(torch.isfinite(found.logits).all()):
        return Judgement(False, "logits that are not finite")
    if ignored is not None and found.logits is not None and _is_ignored(reference, found, ignored, allowed):
        return Judgement(False, "the edit was silently ignored: the answer is the one without it")
    worst, steps, off = 0.0, 0, None
    for row in range(len(reference.tokens)):
        parted = (reference.tokens[row] != found.tokens[row]).nonzero()
        last = int(parted[0]) + 1 if len(parted) else reference.tokens.shape[1]
        for step, apart in enumerate(_apart(reference, found, row, last)):
            worst, off = max(worst, apart), step if off is None and apart > allowed else off
        steps += last
        if off is None and len(parted) and not _near_tie(reference, found, row, last - 1, allowed):
            return Judgement(False, f"row {row} chooses another token at step {last - 1}, and it is no tie")
    logits = "no logits given" if found.logits is None else f"logits within {worst:.1e}, tolerance {allowed:.1e}"
    if off is not None:
        right_before = ", right before it: the edit does not act from there on" if off and ignored is not None else ""
        return Judgement(False, f"{logits}: wrong from step {off} on{right_before}")
    return Judgement(True, f"{logits}; {steps} of {reference.tokens.numel()} steps compared")


def _apart(reference: Answer, found: Answer, row: int, last: int) -> list[float]:
    """Distances of a row's logits, step by step; none where there are no logits."""
    if found.logits is None or reference.logits is None:
        return []
    ours, right = found.logits[row], reference.logits[row]
    return [distance(ours[step], right[step]) for step in range(last)]


def _is_ignored(reference: Answer, found: Answer, ignored: Answer, allowed: float) -> bool:
    """Whether an answer is the one without the edits, where that can be told from the one with them."""
    assert reference.logits is not None and found.logits is not None and ignored.logits is not None
    effect = distance(ignored.logits[:, 0], reference.logits[:, 0])
    return effect > 2 * allowed and distance(found.logits[:, 0], ignored.logits[:, 0]) < effect / 2


def _near_tie(reference: Answer, found: Answer, row: int, step: int, allowed: float) -> bool:
    assert reference.logits is not None
    best, other = int(reference.tokens[row, step]), int(found.tokens[row, step])
    return near_tie(reference.logits[row, step], best, other, allowed)


def near_tie(logits: torch.Tensor, best: int, other: int, allowed: float) -> bool:
    """Whether a tolerance makes two tokens as good as equal by their logits ``[vocab]``."""
    values = logits.float()
    return float(values[best] - values[other]) <= 8 * allowed * float(values.std())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN and signed zeros included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    first, second = (t.detach().cpu().contiguous().view(torch.uint8) for t in (a, b))
    return bool(torch.equal(first, second))
