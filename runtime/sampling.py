"""Choosing the next token from logits: greedy, or sampled by a counter-based generator.

A token is a function of its row's logits, seed and position alone. To make that hold to the bit,
probabilities become integers before they are added: integer sums are exact in any order, where a
floating-point scan on a GPU may differ from batch to batch and even from run to run. (Between CPU
and GPU the last bit of an exponential can differ, hence, once in a very long while, a token.)
With everything on one device nothing here waits for it, so that a step with its sampling can be
one CUDA graph.

Logits may hold NaN. No row can disturb another, and a row that has a NaN, or nothing above -Inf,
is decided greedily: the first maximum among what is not NaN, or token 0 where all are.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from djinn_fx.errors import InvalidValue
from djinn_fx.kernels.advance import greedy
from djinn_fx.kernels.philox import uniform

#: Slack on top_p, as a share of the total: a set whose mass is top_p but for rounding is enough.
MASS_SLACK = 2.0**-40


@dataclass(frozen=True)
class SamplingSpec:
    """How to choose a token; temperature first, then top_k, then top_p, as transformers does.

    Attributes:
        do_sample: draw a token; otherwise take the most likely one, and the rest has no effect.
        temperature: divides the logits.
        top_k: only the ``top_k`` most likely tokens, and those as likely as the last of them.
        top_p: only the fewest most likely tokens whose probabilities add up to ``top_p``.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _check_temperature(self.temperature, self.do_sample)
        if self.top_k is not None and (not _is_number(self.top_k, int) or self.top_k < 1):
            raise InvalidValue(f"top_k={self.top_k!r}: must be an integer of 1 or more; None keeps every token.")
        if self.top_p is not None and not (_is_number(self.top_p) and 0.0 < self.top_p <= 1.0):
            raise InvalidValue(f"top_p={self.top_p!r}: must be above 0 and at most 1; None keeps every token.")


def checked_seed(seed: object) -> int:
    """``seed`` as an int.

    Raises:
        InvalidValue: not an integer, or one of more than 64 bits.
    """
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = 1 << 63
    if not -(1 << 63) <= number < 1 << 63:
        raise InvalidValue(f"seed={seed!r}: give an integer of 64 bits, -2**63 to 2**63 - 1.")
    return number


def sample(logits: Tensor, spec: SamplingSpec, seeds: Tensor, positions: Tensor) -> Tensor:
    """Choose one token per row.

    Args:
        logits: ``[B, V]``, any floating-point dtype.
        spec: how to choose.
        seeds: int64 ``[B]``, not read when greedy. On the device of ``logits``, or on the CPU: the
            numbers are then drawn there, which spares a GPU some hundred small launches.
        positions: int64 ``[B]``, of the tokens that are chosen; beside the seeds.

    Returns:
        int64 ``[B]``.
    """
    if not spec.do_sample:
        return greedy(logits)
    share = uniform(seeds, positions).to(logits.device, non_blocking=True)
    return invert(weights(logits, spec), share)


def invert(found: Tensor, share: Tensor) -> Tensor:
    """The token at which the running sum of the weights passes a share of their total.

    Args:
        found: int64 ``[B, V]``, what :func:`weights` gives.
        share: fp64 ``[B]`` in ``[0, 1)``.

    Returns:
        int64 ``[B]``; never a token of weight 0.
    """
    cumulative = found.cumsum(-1)
    # The largest share is 1 - 2**-53: times a double, that is the next smaller double at most,
    # which lies below the total however the total was rounded.
    target = (share[:, None] * cumulative[:, -1:].double()).to(torch.int64)
    return (cumulative <= target).sum(-1)


def weights(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """The probabilities from which :func:`sample` draws, as integers.

    A row's most likely token has the weight ``2**(62 - bits of V)``, so that a row's sum stays
    below ``2**62``. Tokens that top_k or top_p excludes have the weight 0, as has a token so
    unlikely that its share rounds to it (below ``1e-13`` of the most likely one's for 2**18
    tokens). In a row that is decided greedily, only that token has any.

    Args:
        logits: ``[B, V]``.
        spec: ``do_sample`` is not read.

    Returns:
        int64 ``[B, V]``, every row's sum positive.
    """
    values = _without_nan(logits)
    peak = values.amax(-1, keepdim=True)
    distance = (values.double() - peak.double()) / spec.temperature
    # Infinity minus itself is NaN; the maximum stands at distance 0 from itself.
    likely = torch.where(values == peak, 1.0, distance.exp())
    found = (likely * 2.0 ** (62 - values.shape[-1].bit_length())).to(torch.int64)
    if spec.top_k is not None:
        found = _keep_top_k(found, values, spec.top_k)
    if spec.top_p is not None:
        found = _keep_top_p(found, values, spec.top_p)
    certain = torch.zeros_like(found).scatter(-1, greedy(logits)[:, None], 1)
    undecided = logits.isnan().any(-1, keepdim=True) | (peak == -math.inf)
    return torch.where(undecided, certain, found)


def _keep_top_k(found: Tensor, values: Tensor, top_k: int) -> Tensor:
    """Keep what is not below the ``top_k``-th largest value: ties at the border stay in."""
    last = values.topk(min(top_k, values.shape[-1])).values[:, -1:]
    return torch.where(values >= last, found, 0)


def _keep_top_p(found: Tensor, values: Tensor, top_p: float) -> Tensor:
    """Drop the least likely tokens as long as what they add up to is within ``1 - top_p``.

    Among equals at the border the first are dropped, as transformers' ``TopPLogitsWarper`` does.
    """
    order = values.sort(dim=-1, stable=True).indices
    cumulative = found.gather(-1, order).cumsum(-1)
    spare = ((1.0 - top_p + MASS_SLACK) * cumulative[:, -1:].double()).to(torch.int64)
    drop = cumulative <= spare
    drop[:, -1] = False
    return found.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0)


def _without_nan(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits.isnan(), -math.inf)


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds or (int, float)) and not isinstance(value, bool)


def _check_temperature(temperature: float, do_sample: bool) -> None:
    valid = _is_number(temperature) and math.isfinite(temperature) and temperature >= 0
    if valid and (temperature > 0 or not do_sample):
        return
    if valid:
        raise InvalidValue("temperature=0 leaves nothing to draw; for the most likely token say do_sample=False.")
    raise InvalidValue(f"temperature={temperature!r}: must be a finite number above 0.")
