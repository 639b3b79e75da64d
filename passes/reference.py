"""The eager model as a reference: what the receipt compares the captured model with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from djinn_fx.passes.source import clone_of


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
def reference(model: nn.Module, tokens: list[int], attention: str, blocks: tuple[str, ...]) -> Reference | None:
    """Run the eager model on one prompt, on a clone that shares its weights.

    Args:
        model: the user's model.
        tokens: the prompt.
        attention: ``"eager"`` or ``"sdpa"``.
        blocks: paths of the modules whose outputs are wanted.

    Returns:
        None where the model does not support this attention implementation.
    """
    clone: Any = clone_of(model)
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
    device = next(model.parameters()).device
    ids = torch.tensor([tokens], device=device)
    mask = torch.ones_like(ids)
    logits = clone(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return Reference(logits, found)
