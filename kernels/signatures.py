"""The signatures of the operators: what every backend of one takes and gives.

The schema strings are what torch registers, the protocols are what mypy checks implementations
against. Both are here and nowhere else, so that torch and Triton cannot drift apart.

Sizes: ``B`` batch rows, ``T`` query tokens per row, ``H`` query heads, ``Hkv`` key-value heads,
``D`` and ``Dv`` key and value widths, ``R`` arena rows, ``S`` arena positions. Arenas are
``[R + 1, Hkv, S + 1, D]``: the last row and the last position are spare; they may be written and
are never read.

Of batch row ``b`` the first ``lengths[b] - positions[b, 0]`` query tokens are valid and stand at
consecutive positions; the rest are pads with position 0. A row of length 0 is dead: all pads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

MARK = "(Tensor x, str name) -> Tensor"

KV_WRITE = (
    "(Tensor(a!) k_arena, Tensor(b!) v_arena, Tensor k, Tensor v, Tensor rows, Tensor positions, Tensor lengths) -> ()"
)

ATTENTION = (
    "(Tensor q, Tensor k_arena, Tensor v_arena, Tensor rows, Tensor positions, Tensor lengths, "
    "int? window, float? softcap, Tensor? sinks, float scale) -> Tensor"
)

LINEARS = "(Tensor x, Tensor[] weights, Tensor?[] biases, bool[] transposed) -> Tensor[]"

LINEAR_RESIDUAL = (
    "(Tensor x, Tensor weight, Tensor? bias, bool transposed, Tensor residual, Tensor? act, Tensor? scale, "
    "Tensor? add, Tensor? inject, Tensor? tap, Tensor[] soon) -> Tensor"
)


class Mark(Protocol):
    """The signature of ``djinn::mark``."""

    def __call__(self, x: Tensor, name: str) -> Tensor:
        """Copy ``x``; the name is for whoever reads the graph."""


class KvWrite(Protocol):
    """The signature of ``djinn::kv_write``."""

    def __call__(
        self,
        k_arena: Tensor,
        v_arena: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        positions: Tensor,
        lengths: Tensor,
    ) -> None:
        """Put the keys and values of a step into the arenas, in place.

        A pad writes to the spare position of its row; what stays there is not defined.

        Args:
            k_arena: ``[R + 1, Hkv, S + 1, D]``.
            v_arena: ``[R + 1, Hkv, S + 1, Dv]``.
            k: ``[B, Hkv, T, D]`` in the arena's dtype, any strides.
            v: ``[B, Hkv, T, Dv]``, likewise.
            rows: int64 ``[B]``, the arena row of each batch row; those of live rows differ.
            positions: int64 ``[B, T]``, absolute; 0 at pads.
            lengths: int64 ``[B]``, valid positions after this step; 0 for a dead row.
        """


class Attention(Protocol):
    """The signature of ``djinn::attention``."""

    def __call__(
        self,
        q: Tensor,
        k_arena: Tensor,
        v_arena: Tensor,
        rows: Tensor,
        positions: Tensor,
        lengths: Tensor,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Causal attention of each batch row over the valid prefix of its own arena row.

        The arithmetic is fp32 (fp64 for fp64), rounded once at the end. A row's bits depend on
        its own tokens, positions and keys alone: not on the rest of the batch, its place there,
        the arena's size or what unread positions hold, be it NaN. (Steps of one token may be
        another kernel's, with other bits than the same token has in a wider step.) Inf and NaN
        among the values reach the queries that see them and no others.

        Args:
            q: ``[B, H, T, D]``, any strides; head ``h`` reads key-value head ``h // (H // Hkv)``.
            k_arena: ``[R + 1, Hkv, S + 1, D]``; the step's own keys are in it already.
            v_arena: ``[R + 1, Hkv, S + 1, Dv]``, likewise.
            rows: int64 ``[B]``, as in :class:`KvWrite`, like the next two.
            positions: int64 ``[B, T]``.
            lengths: int64 ``[B]``.
            window: a query at ``p`` sees the keys at ``p - window < j <= p``; None: ``j <= p``.
            softcap: logits become ``softcap * tanh(logits / softcap)``; None: they stay.
            sinks: ``[H]``, one more logit per head in the softmax, its value dropped; or None.
            scale: factor of the dot products.

        Returns:
            ``[B, T, H, Dv]``, contiguous, in ``q``'s dtype; zeros at pads and in dead rows.
        """


class Linears(Protocol):
    """The signature of ``djinn::linears``."""

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], transposed: Sequence[bool]
    ) -> list[Tensor]:
        """Several linear layers of the same input, each weight read where it lies.

        In bf16 and fp16 sums are fp32, the bias is added to them and the whole is rounded once.

        Args:
            x: ``[..., K]``.
            weights: ``[N, K]`` each, as in ``nn.Linear``; ``[K, N]`` where ``transposed``.
            biases: ``[N]`` or None for each weight.
            transposed: for each weight.

        Returns:
            ``[..., N]`` for each weight, contiguous, in ``x``'s dtype.
        """


class LinearResidual(Protocol):
    """The signature of ``djinn::linear_residual``."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        residual: Tensor,
        act: Tensor | None,
        scale: Tensor | None,
        add: Tensor | None,
        inject: Tensor | None,
        tap: Tensor | None,
        soon: Sequence[Tensor],
    ) -> Tensor:
        """A linear layer, the residual that it is added to, and the edits of the sum: one token per row.

        Every step is rounded to the result's dtype, as the ops that it stands for are: the layer (see
        :class:`Linears`), the sum, ``round(sum * scale) + add`` where ``act``, and ``tap`` in its place where
        ``inject``.

        Args:
            x: ``[..., K]``, ``B`` rows in all.
            weight: ``[N, K]``, or ``[K, N]`` if ``transposed``.
            bias: ``[N]`` or None.
            transposed: the weight's layout.
            residual: ``[B, 1, N]`` in ``x``'s dtype, any strides.
            act: bool ``[B, 1, 1]``; None: no edits, and neither ``scale`` nor ``add``.
            scale: ``[B, 1, N]`` in fp32, or fp64 for fp64.
            add: likewise.
            inject: bool ``[B, 1, 1]``; None: nothing is injected.
            tap: ``[B, 1, N]`` in ``x``'s dtype.
            soon: tables ``[B, slots, N]`` that are read next; they may be brought nearer, and change nothing.

        Returns:
            ``[B, 1, N]``, contiguous.
        """
