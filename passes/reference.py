"""The eager model as a reference: what the receipt compares the captured model with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from djinn_fx.passes.source import StandIn, clone_of

#: Gives what the module of a path runs in, or None.
Around = Callable[[str], AbstractContextManager[object] | None]


@dataclass(frozen=True)
class Reference:
    """One eager forward pass.

    Attributes:
        logits: ``[T, vocab]``.
        blocks: output of each block, ``[T, hidden]``, by module path.
    """

    logits: torch.Tensor
    blocks: dict[str, torch.Tensor]


@torch.no_grad()
def reference(
    model: nn.Module,
    tokens: list[int],
    attention: str,
    blocks: tuple[str, ...],
    *,
    stand_in: StandIn | None = None,
    around: Around | None = None,
) -> Reference | None:
    """Run the eager model on one prompt, on a clone that shares its weights.

    Args:
        model: the user's model.
        tokens: the prompt.
        attention: ``"eager"`` or ``"sdpa"``.
        blocks: paths of the modules whose outputs are wanted.
        stand_in: gives the tensors to compute with, see :func:`djinn_fx.passes.source.clone_of`.
        around: what modules run in; None: nothing.

    Returns:
        None where the model does not support this attention implementation.
    """
    clone: Any = clone_of(model, stand_in)
    try:
        clone.set_attn_implementation(attention)
    except ValueError:
        return None
    found: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            value = output if isinstance(output, torch.Tensor) else output[0]
            found[path] = value.detach()[0].clone()

        return hook

    handles = [clone.get_submodule(path).register_forward_hook(keep(path)) for path in blocks]
    if around is not None:
        for path, module in clone.named_modules():
            _wrap(module, path, around)
    device = next(clone.parameters()).device
    ids = torch.tensor([tokens], device=device)
    mask = torch.ones_like(ids)
    logits = clone(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return Reference(logits, found)


def _wrap(module: nn.Module, path: str, around: Around) -> None:
    """Let a module of the clone run in what belongs around it."""
    if around(path) is None:
        return
    forward = module.forward

    def inside(*args: Any, **kwargs: Any) -> Any:
        context = around(path)
        assert context is not None
        with context:
            return forward(*args, **kwargs)

    module.forward = inside
