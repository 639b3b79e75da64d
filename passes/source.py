"""The model to capture: a structural clone that shares every tensor, and what is known of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from djinn_fx.errors import CaptureError
from djinn_fx.passes import hf
from djinn_fx.passes.support import check, kind_of
from djinn_fx.program import AttentionSpec, KVSpec

#: Positional and keyword arguments of a plain module.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]

#: Gives the tensor that a program reads in place of one of the model's.
StandIn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Source:
    """A model, ready to be captured.

    Attributes:
        kind: ``"lm"``: a causal language model; ``"module"``: any other module.
        clone: a copy of the module tree that shares parameters and buffers with the user's module.
        dtype: dtype of the parameters.
        device: where they are.
        kv: what each layer keeps per position; empty for plain modules.
        vocab_size: width of the logits, or None.
        attention: how each layer attends; empty for plain modules.
        model_type: the configuration's model type, or the class name.
        config: the configuration as a dictionary; empty for plain modules.
        example_inputs: normalised arguments of a plain module.
        reasons: remarks of :func:`djinn_fx.passes.support.check`.
        lock: held while the clone is traced. Tracing also patches ``nn.Module`` for the whole process: no
            other thread should run eager modules meanwhile.
    """

    kind: Literal["lm", "module"]
    clone: nn.Module
    dtype: torch.dtype
    device: torch.device
    kv: tuple[KVSpec, ...] = ()
    vocab_size: int | None = None
    attention: tuple[AttentionSpec, ...] = ()
    model_type: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    example_inputs: Inputs | None = None
    reasons: tuple[str, ...] = ()
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer, or None where it sees everything."""
        return tuple(spec.window for spec in self.attention)


def prepare(model: nn.Module, example_inputs: object = None, stand_in: StandIn | None = None) -> Source:
    """Clone ``model`` and find out what is needed to capture it. The model itself is not touched.

    Args:
        model: a causal language model of transformers, or any module.
        example_inputs: for a plain module, its arguments: a tuple, or a mapping of keyword arguments.
        stand_in: gives what programs read in place of each tensor; None: the tensor itself.

    Raises:
        CaptureError: with every reason why the model cannot be captured.
    """
    support = check(model, example_inputs)
    if not support.ok:
        raise CaptureError(f"{type(model).__name__} cannot be compiled: " + "; ".join(support.reasons))
    clone = clone_of(model, stand_in)
    tensors = [*clone.parameters(), *clone.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = _dtype_of(tensors)
    if kind_of(model, example_inputs) == "module":
        return Source(
            kind="module",
            clone=clone,
            dtype=dtype,
            device=device,
            model_type=type(model).__name__,
            example_inputs=normalise_inputs(example_inputs),
            reasons=support.reasons,
        )
    hf.use_djinn_attention(clone)
    kv, attention, vocab = _probe(clone, device)
    config: Any = clone.config
    return Source(
        kind="lm",
        clone=clone,
        dtype=dtype,
        device=device,
        kv=kv,
        vocab_size=vocab,
        attention=attention,
        model_type=config.model_type,
        config=config.to_dict(),
        reasons=support.reasons,
    )


def clone_of(model: nn.Module, stand_in: StandIn | None = None) -> nn.Module:
    """Copy the module tree, sharing every tensor: parameters, buffers and those in plain attributes.

    Args:
        model: the module.
        stand_in: gives what shall be in the copy in place of each tensor; None: the tensor itself.

    Raises:
        CaptureError: a module holds something that cannot be copied.
    """
    shared = stand_in or _itself
    memo: dict[int, Any] = {id(tensor): shared(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        for name, value in vars(module).items():
            if name == "_cache":  # the keys and values of an earlier generate
                memo[id(value)] = None
            leaves = pytree.tree_leaves(value) if isinstance(value, (torch.Tensor, list, tuple, dict)) else ()
            memo |= {id(leaf): shared(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be cloned (a structural copy that shares the weights is what gets "
            f"captured): {type(error).__name__}: {error}. Remove the attribute that cannot be copied."
        ) from error


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _dtype_of(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The floating point dtype that most elements have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def normalise_inputs(example_inputs: object) -> Inputs:
    """Bring ``example_inputs`` into the form ``(args, kwargs)``, which is also accepted.

    Raises:
        CaptureError: neither arguments nor keyword arguments.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        if list(map(type, example_inputs)) == [tuple, dict]:
            return example_inputs[0], dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs must be a tuple of arguments or a mapping of keyword arguments, not "
        f"{type(example_inputs).__name__}."
    )


def flatten_inputs(inputs: Inputs) -> tuple[dict[str, torch.Tensor], tuple[Any, ...]]:
    """Split a plain module's arguments into tensors by environment name and a hashable key.

    Two calls with equal keys run the same program: it holds the structure, the non-tensor leaves and
    each tensor's shape, dtype and device.
    """
    leaves, spec = pytree.tree_flatten(inputs)
    tensors: dict[str, torch.Tensor] = {}
    key: list[Any] = [repr(spec)]
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            tensors[f"in.{index}"] = leaf
            key.append((tuple(leaf.shape), leaf.dtype, leaf.device))
        else:
            key.append(repr(leaf))
    return tensors, tuple(key)


def _probe(clone: nn.Module, device: torch.device) -> tuple[tuple[KVSpec, ...], tuple[AttentionSpec, ...], int]:
    """Run two tokens through the clone on fake tensors to see what attention and cache ask for."""
    config: Any = clone.config
    layers = int(config.get_text_config().num_hidden_layers)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
        positions = torch.zeros(1, 2, dtype=torch.long, device=device)
        rows = torch.zeros(1, dtype=torch.long, device=device)
        step = hf.Step(rows, positions, rows, arenas=None)
        try:
            with hf.stepping(step):
                logits = clone(
                    input_ids=tokens,
                    position_ids=positions,
                    past_key_values=hf.arena_cache(layers),
                    use_cache=True,
                ).logits
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(clone).__name__} cannot run on the KV arena: {type(error).__name__}: {error}. "
                "djinn.check(model) says what is supported; any part of the model can be compiled as a plain module "
                "with example_inputs."
            ) from error
    calls = {call.layer: call for call in step.calls}
    missing = [str(layer) for layer in range(layers) if layer not in calls]
    if missing or len(step.calls) != layers:
        raise CaptureError(
            f"{type(clone).__name__}: layers {', '.join(missing) or 'with several attention calls'} do not attend once "
            "through the attention interface with a cache of their own (recurrent state, shared or missing KV)."
        )
    ordered = [calls[layer] for layer in range(layers)]
    return tuple(call.kv for call in ordered), tuple(call.attention for call in ordered), int(logits.shape[-1])
