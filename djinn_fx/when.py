"""Predicates for breakpoints: ``djinn.when.norm_above(40.0)`` and its siblings.

A predicate gets one position's activation ``h`` and returns a 0-d bool tensor. It is vectorised over positions by
``torch.func.vmap``, so it may use any torch operation that does not branch on data. These built-in ones can be saved
in a checkpoint; a function of your own cannot. They vectorise themselves, which costs the host a fraction of ``vmap``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class BuiltIn(ABC):
    """A predicate that looks at many positions at once; on one it is the same."""

    @abstractmethod
    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on ``[positions, ...]``: bool ``[positions]``."""

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Evaluate on one position's activation."""
        return self.rows(h[None])[0]


def _flat(values: torch.Tensor) -> torch.Tensor:
    """``[positions, width]`` in fp32."""
    return values.reshape(values.shape[0], -1).float()


def _direction(vector: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """A predicate's vector in fp32, beside the values it is held against: of just their width, or it is refused."""
    if vector.shape != flat.shape[1:]:
        raise ValueError(f"its vector has shape {tuple(vector.shape)}, the values have width {flat.shape[1]}")
    return vector.to(flat.device, torch.float32)


@dataclass(frozen=True)
class NormAbove(BuiltIn):
    """True where the Euclidean norm of the activation, in fp32, exceeds ``limit``."""

    limit: float

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on ``[positions, ...]``: bool ``[positions]``."""
        return torch.gt(torch.linalg.vector_norm(_flat(values), dim=1), self.limit)


@dataclass(frozen=True, eq=False)
class Probe(BuiltIn):
    """True where the linear probe ``w . h + b`` is positive."""

    w: torch.Tensor
    b: float

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on ``[positions, ...]``: bool ``[positions]``."""
        flat = _flat(values)
        return torch.gt((_direction(self.w, flat) * flat).sum(1) + self.b, 0)


@dataclass(frozen=True, eq=False)
class CosineAbove(BuiltIn):
    """True where the cosine between the activation and ``d`` exceeds ``limit``."""

    d: torch.Tensor
    limit: float

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on ``[positions, ...]``: bool ``[positions]``."""
        flat = _flat(values)
        d = _direction(self.d, flat)
        norms = torch.linalg.vector_norm(flat, dim=1)
        return torch.gt((d * flat).sum(1), self.limit * torch.linalg.vector_norm(d) * norms)


@dataclass(frozen=True)
class Nonfinite(BuiltIn):
    """True where the activation holds a NaN or an infinity."""

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on ``[positions, ...]``: bool ``[positions]``."""
        return ~torch.isfinite(values.reshape(values.shape[0], -1)).all(1)


@dataclass(frozen=True)
class EntropyBelow(BuiltIn):
    """True where the entropy of ``softmax(h)``, in nats, is below ``limit``; meant for ``logits``."""

    limit: float

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on ``[positions, ...]``: bool ``[positions]``."""
        log_p = torch.log_softmax(_flat(values), dim=1)
        # p log p is 0 where p is 0, also where log p is -inf.
        return torch.lt(-torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1), self.limit)


@dataclass(frozen=True)
class Token(BuiltIn):
    """True where the position's input token is ``id``; the activation is not looked at."""

    id: int

    #: Tells the runtime to pass the position's token instead of its activation.
    reads_token = True

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Evaluate on input tokens, int64 ``[positions]``."""
        return torch.eq(values, self.id)


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
