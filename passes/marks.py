"""Marks: ``djinn::mark`` nodes, planted by hooks on a clone, that carry module paths into the graph.

A mark is written into the graph that is being traced and not called: to call an operator under torch's tracer takes a
millisecond, and a model has hundreds of modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.node import has_side_effect

import djinn_fx.kernels.ops  # noqa: F401 - registers djinn::mark

#: Nobody uses what it gives, so torch must be told that it is not dead code.
MARK = has_side_effect(torch.ops.djinn.mark.default)
INPUT = ":in"


@contextmanager
def marking(clone: nn.Module) -> Iterator[None]:
    """Mark inputs and outputs of every submodule of ``clone`` while the block runs, which traces it.

    A mark's name is ``PATH#k`` or ``PATH#k:in`` for the k-th call of the module at PATH.
    """
    calls: Counter[str] = Counter()
    handles = [clone.register_forward_pre_hook(_without_stack_traces)]
    for path, module in clone.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(_before(path, calls), with_kwargs=True))
            handles.append(module.register_forward_hook(_after(path, calls)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_stack_traces(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Leave the Python stack of every op unwritten: nobody reads it, and it takes a fifth of an export."""
    mode = get_proxy_mode()
    if mode is not None:
        mode.tracer.record_stack_traces = False


def _before(path: str, calls: Counter[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[path] += 1
        name = f"{path}#{calls[path]}{INPUT}"
        _mark_first(args, name) or _mark_first(kwargs, name)

    return hook


def _after(path: str, calls: Counter[str]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _mark_first(output, f"{path}#{calls[path]}")

    return hook


def _mark_first(value: Any, name: str) -> bool:
    """Mark the first floating point tensor of a tensor, sequence or mapping; whether there is one."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else (value,)
    for item in items:
        if isinstance(item, torch.Tensor) and item.dtype.is_floating_point:
            _mark(item, name)
            return True
    return False


def _mark(tensor: torch.Tensor, name: str) -> None:
    """Write a mark of a traced tensor into the graph; what is not traced is a constant, and no site."""
    mode = get_proxy_mode()
    assert mode is not None, "marks are planted while a model is traced"
    traced = get_proxy_slot(tensor, mode.tracer, None)
    if traced is not None:
        node = traced.proxy.node
        mark = mode.tracer.create_node("call_function", MARK, (node, name), {})
        mark.meta["val"] = node.meta["val"]
