"""The pieces by which a Hugging Face model is captured: attention, mask, experts and cache.

Importing this module registers the three functions with transformers under the name ``djinn``. They
work inside ``with stepping(...)``, which carries the step's rows, positions and lengths to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.moe import (
    ExpertsInterface,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)
from transformers.masking_utils import AttentionMaskInterface

import djinn_fx.kernels.ops  # noqa: F401 - registers djinn::attention and djinn::kv_write
from djinn_fx.errors import CaptureError
from djinn_fx.program import AttentionSpec, KVSpec

NAME = "djinn"

#: Tensor arguments of attention functions that change nothing here.
_HARMLESS = frozenset({"position_ids", "cache_position"})


@dataclass(frozen=True)
class Call:
    """One attention call of a step, as the probe saw it."""

    layer: int
    kv: KVSpec
    attention: AttentionSpec


@dataclass
class Step:
    """The inputs of one step that attention and cache need.

    Attributes:
        rows: arena row of each batch row.
        positions: absolute positions ``[rows, query]``.
        lengths: valid positions after the step.
        arenas: keys and values of each layer; None while probing.
        pending: layer whose cache was updated last and has not attended yet.
        calls: the attention calls so far.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    arenas: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    pending: int | None = None
    calls: list[Call] = field(default_factory=list)


_STEP: ContextVar[Step] = ContextVar("djinn_step")


@contextmanager
def stepping(step: Step) -> Iterator[Step]:
    """Make ``step`` the one that attention, experts and cache of this thread see."""
    token = _STEP.set(step)
    try:
        yield step
    finally:
        _STEP.reset(token)


class ArenaLayer(CacheLayerMixin):
    """A cache layer that gives back what it is given; the attention function writes the arena.

    Whatever a model does to keys and values between its cache and its attention (multi-head latent
    attention expands them there) is done per token, so doing it before the write gives the same
    numbers, and the arena holds what attention reads.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the arena exists."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note that this layer attends next."""
        _STEP.get().pending = self.layer
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset for the mask function, which ignores them."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are given explicitly, nothing may be derived from the cache's length."""
        return 0

    def get_max_length(self) -> int:
        """No bound of its own."""
        return -1

    get_max_cache_shape = get_max_length


def arena_cache(layers: int) -> Cache:
    """The cache object to hand to a model of so many layers."""
    return Cache(layers=[ArenaLayer(layer) for layer in range(layers)])


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function ``djinn``: ``[B, H, T, D]`` to ``[B, T, H, Dv]``.

    Raises:
        CaptureError: the model asks for something that the op does not do.
    """
    step, where = _STEP.get(), type(module).__name__
    layer, step.pending = step.pending, None
    _refuse_odd(module, query, key, layer, attention_mask, kwargs)
    assert layer is not None
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if window is not None and not isinstance(window, int):
        raise CaptureError(f"{where}: sliding_window is {window!r}, expected a number.")
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if step.arenas is None:
        step.calls.append(_call(layer, (query, key, value), window or None, softcap or None, scale, s_aux))
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        return out, None
    keys, values = step.arenas[layer]
    where_to = (step.rows, step.positions, step.lengths)
    torch.ops.djinn.kv_write(keys, values, key, value, *where_to)
    out = torch.ops.djinn.attention(query, keys, values, *where_to, window or None, softcap or None, s_aux, scale)
    return out, None


def _call(
    layer: int,
    tensors: tuple[torch.Tensor, ...],
    window: int | None,
    softcap: float | None,
    scale: float,
    sinks: torch.Tensor | None,
) -> Call:
    """What the probe keeps of a call with these queries, keys and values."""
    query, key, value = tensors
    layouts = tuple(tensor.stride()[1:] for tensor in tensors)
    dtype = None if sinks is None else sinks.dtype
    kv = KVSpec(int(key.shape[1]), int(key.shape[3]), int(value.shape[3]))
    return Call(layer, kv, AttentionSpec(int(query.shape[1]), layouts, window, softcap, scale, dtype))


def _refuse_odd(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    layer: int | None,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse attention that is not causal self-attention over a cache of its own."""
    where = type(module).__name__
    if layer is None:
        raise CaptureError(f"{where} attends without updating a cache of its own (shared or missing keys and values).")
    if key.shape[2] != query.shape[2]:
        raise CaptureError(f"{where} attends to other tokens than the step's own and cached ones.")
    if mask is not None:
        raise CaptureError(
            f"{where} builds an attention mask of its own; only causal and sliding windows are supported."
        )
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise CaptureError(f"{where} is not causal; compile the model with example_inputs.")
    odd = sorted(name for name, given in kwargs.items() if isinstance(given, torch.Tensor) and name not in _HARMLESS)
    if odd:
        raise CaptureError(f"{where} passes {', '.join(odd)} to attention, which is not supported.")


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function ``djinn``: the op masks by itself."""
    return None


def use_djinn_attention(clone: nn.Module) -> None:
    """Switch a clone to the functions above, and off what it would return beside the logits."""
    configs = {id(m.config): m.config for m in clone.modules() if hasattr(m, "config")}
    for config in configs.values():
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation_internal = NAME
            config._experts_implementation_internal = NAME
            for extra in ("output_hidden_states", "output_attentions", "output_router_logits"):
                if getattr(config, extra, False):
                    setattr(config, extra, False)


def experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts function ``djinn``: ``[tokens, hidden]`` to the same, without a host sync on CUDA.

    A token's bits must not depend on which experts other tokens chose. The grouped matrix product keeps
    that on CUDA in bfloat16 only; elsewhere it is a loop over products as tall as an expert is popular
    (with counts read on the host). There, the chosen experts' weights are gathered while these are no
    more than the weights themselves, and else every expert is computed.
    """
    step = _STEP.get(None)
    if step is not None and step.arenas is None:
        return torch.empty_like(hidden_states)
    grouped = hidden_states.dtype == torch.bfloat16 and hidden_states.device.type == "cuda"
    forward: Callable[..., torch.Tensor]
    if grouped:
        forward = grouped_mm_experts_forward
    elif top_k_index.numel() <= module.num_experts:
        forward = batched_mm_experts_forward
    else:
        forward = dense_experts
    return forward(module, hidden_states, top_k_index, top_k_weights)


def dense_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Every expert on every token; the ones not chosen are dropped."""
    kind = "gate_up_proj" if module.has_gate else "up_proj"
    up = _every_expert(module, hidden_states.unsqueeze(0), kind)
    inner = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    out = _every_expert(module, inner, "down_proj")
    ids = torch.arange(module.num_experts, device=out.device)
    chosen = top_k_index.unsqueeze(0) == ids[:, None, None]
    weight = torch.where(chosen, top_k_weights.unsqueeze(0), 0.0).sum(-1, keepdim=True)
    out = torch.where(chosen.any(-1, keepdim=True), out * weight, 0.0)
    return out.sum(0).to(hidden_states.dtype)


def _every_expert(module: Any, value: torch.Tensor, name: str) -> torch.Tensor:
    """``[1 or experts, tokens, in]`` through every expert's weight: ``[experts, tokens, out]``."""
    weight = getattr(module, name)
    out: torch.Tensor = value @ (weight if module.is_transposed else weight.transpose(1, 2))
    return out + getattr(module, f"{name}_bias").unsqueeze(1) if module.has_bias else out


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _no_mask)
ExpertsInterface.register(NAME, experts)
