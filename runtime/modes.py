"""torch's modes, entered where a step needs them at a fraction of what torch's own contexts cost the host.

A decode step crosses a dozen of these borders. ``@torch.no_grad()`` makes a context anew at each call, which on a slow
host takes longer than the call it guards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Found = TypeVar("Found")


def without_grad(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """What ``@torch.no_grad()`` does; nothing where gradients are off already."""

    @wraps(function)
    def quietly(*args: Given.args, **named: Given.kwargs) -> Found:
        if not torch.is_grad_enabled():
            return function(*args, **named)
        torch.set_grad_enabled(False)
        try:
            return function(*args, **named)
        finally:
            torch.set_grad_enabled(True)

    return quietly


def outside_inference() -> AbstractContextManager[object]:
    """Where tensors are made that live longer than a call: those of inference mode could not be written outside it.

    Gradients stay as they are: to leave inference mode would turn them on.
    """
    return _outside(torch.is_grad_enabled()) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _outside(grad: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield
