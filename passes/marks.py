"""Marks: ``djinn::mark`` ops, planted on a clone by hooks, that carry module paths into the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import djinn_fx.kernels.ops  # noqa: F401 - registers djinn::mark

MARK = torch.ops.djinn.mark.default
INPUT = ":in"


@contextmanager
def marking(clone: nn.Module) -> Iterator[None]:
    """Mark inputs and outputs of every submodule of ``clone`` while the block runs.

    A mark's name is ``PATH#k`` or ``PATH#k:in`` for the k-th call of the module at PATH.
    """
    calls: Counter[str] = Counter()
    handles = []
    for path, module in clone.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(_before(path, calls), with_kwargs=True))
            handles.append(module.register_forward_hook(_after(path, calls)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(path: str, calls: Counter[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls[path] += 1
        name = f"{path}#{calls[path]}{INPUT}"
        marked, found = _mark_first(args, name)
        if not found:
            kwargs, found = _mark_first(kwargs, name)
        return (marked, kwargs) if found else None

    return hook


def _after(path: str, calls: Counter[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        marked, found = _mark_first(output, f"{path}#{calls[path]}")
        return marked if found else None

    return hook


def _mark_first(value: Any, name: str) -> tuple[Any, bool]:
    """Mark the first floating point tensor of a tensor, sequence or mapping; the rest is kept as it is."""
    if isinstance(value, torch.Tensor):
        if not value.dtype.is_floating_point:
            return value, False
        return MARK(value, name), True
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            if isinstance(item, torch.Tensor) and item.dtype.is_floating_point:
                return _rebuilt(value, index, MARK(item, name)), True
        return value, False
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, torch.Tensor) and item.dtype.is_floating_point:
                changed = value if type(value) is not dict else dict(value)
                changed[key] = MARK(item, name)
                return changed, True
    return value, False


def _rebuilt(value: Any, index: int, item: torch.Tensor) -> Any:
    """A copy of a sequence with one item replaced, of the same type (named tuples too)."""
    items = [*value[:index], item, *value[index + 1 :]]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
