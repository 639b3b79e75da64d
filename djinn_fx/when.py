"""Predicates for breakpoints: ``djinn.when.norm_above(40.0)`` and its siblings.

A predicate gets one position's activation ``h`` and returns a 0-d bool tensor. It is vectorised over positions by
``torch.func.vmap``, so it may use any torch operation that does not branch on data. These built-in ones can be saved
in a checkpoint; a function of your own cannot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormAbove:
    """True where the Euclidean norm of the activation, in fp32, exceeds ``limit``."""

    limit: float

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's activation."""
        return torch.gt(h.float().norm(), self.limit)


@dataclass(frozen=True, eq=False)
class Probe:
    """True where the linear probe ``w . h + b`` is positive."""

    w: torch.Tensor
    b: float

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's activation."""
        return torch.gt((self.w.to(h.device, torch.float32) * h.flatten().float()).sum() + self.b, 0)


@dataclass(frozen=True, eq=False)
class CosineAbove:
    """True where the cosine between the activation and ``d`` exceeds ``limit``."""

    d: torch.Tensor
    limit: float

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's activation."""
        d, flat = self.d.to(h.device, torch.float32), h.flatten().float()
        return torch.gt((d * flat).sum(), self.limit * d.norm() * flat.norm())


@dataclass(frozen=True)
class Nonfinite:
    """True where the activation holds a NaN or an infinity."""

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's activation."""
        return ~torch.isfinite(h).all()


@dataclass(frozen=True)
class EntropyBelow:
    """True where the entropy of ``softmax(h)``, in nats, is below ``limit``; meant for ``logits``."""

    limit: float

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's logits."""
        log_p = torch.log_softmax(h.flatten().float(), dim=-1)
        # p log p is 0 where p is 0, also where log p is -inf.
        return torch.lt(-torch.special.xlogy(log_p.exp(), log_p.exp()).sum(), self.limit)


@dataclass(frozen=True)
class Token:
    """True where the position's input token is ``id``; the activation is not looked at."""

    id: int

    #: Tells the runtime to pass the position's token instead of its activation.
    reads_token = True

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's input token, a 0-d int64 tensor."""
        return torch.eq(token, self.id)


def norm_above(limit: float) -> NormAbove:
    """Stop where the activation's Euclidean norm exceeds ``limit``."""
    return NormAbove(float(limit))


def probe(w: torch.Tensor, b: float = 0.0) -> Probe:
    """Stop where the linear probe ``w . h + b`` is positive; ``w`` is ``[width]``."""
    return Probe(w.detach().flatten().float().clone(), float(b))


def cosine_above(d: torch.Tensor, limit: float) -> CosineAbove:
    """Stop where the cosine between the activation and direction ``d`` (``[width]``) exceeds ``limit``."""
    return CosineAbove(d.detach().flatten().float().clone(), float(limit))


def nonfinite() -> Nonfinite:
    """Stop where the activation holds a NaN or an infinity."""
    return Nonfinite()


def entropy_below(limit: float) -> EntropyBelow:
    """Stop where the entropy of ``softmax(h)`` (nats) is below ``limit``; use it at ``logits``."""
    return EntropyBelow(float(limit))


def token(id: int) -> Token:
    """Stop where the position's input token is ``id``."""
    return Token(int(id))
