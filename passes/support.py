"""What can be captured and what cannot, said in a second and before anything is cloned."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from djinn_fx.specs import Support


def kind_of(model: nn.Module, example_inputs: object = None) -> Literal["lm", "module"]:
    """Whether ``model`` is served as a language model or as a plain module."""
    if example_inputs is None and isinstance(model, PreTrainedModel) and model.can_generate():
        return "lm"
    return "module"


def check(model: nn.Module, example_inputs: object = None) -> Support:
    """Say whether ``model`` can be compiled, and why not."""
    return Support(True)
