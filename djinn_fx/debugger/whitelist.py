"""What expressions of the debugger may call, read and compute with."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from djinn_fx.debugger.bounds import Sized


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def _spread(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements of two tensors' products: those that a sum over the last dimension is made of."""
    return math.prod(torch.broadcast_shapes(a.shape, b.shape))


def _product(a: Any, b: Any) -> int:
    """Elements of a matrix product, and of each side as PyTorch copies it for every batch of the other."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)) or max(a.dim(), b.dim()) < 3:
        return 0  # no copies; who calls it sizes the result
    left, right = (a if a.dim() > 1 else a[None]), (b if b.dim() > 1 else b[:, None])
    batch = math.prod(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    return int(batch * max(rows * inner, inner * columns, rows * columns))


#: Functions by name: what is called, and how Python says it; ``{0}`` and on stand for the arguments, if there are any.
FUNCTIONS: Mapping[str, tuple[Callable[..., Any] | Sized, str]] = {
    "norm": (torch.linalg.vector_norm, "torch.linalg.vector_norm"),
    "cosine": (Sized(_cosine, _spread), "torch.nn.functional.cosine_similarity({0}.float(), {1}.float(), dim=-1)"),
    **{
        name: (getattr(torch, name), f"torch.{name}")
        for name in (
            "abs", "argmax", "argmin", "exp", "isfinite", "isnan", "log", "max", "mean", "median", "min", "sigmoid",
            "sign", "softmax", "sqrt", "std", "sum", "tanh", "topk", "var",
        )
    },
}  # fmt: skip

#: Methods of tensors; none returns more elements than it is given, but for what its arguments broadcast.
METHODS = frozenset((
    "abs", "all", "any", "argmax", "argmin", "bool", "clamp", "clone", "cumsum", "dim", "double", "exp", "flatten",
    "float", "isfinite", "isinf", "isnan", "item", "log", "log_softmax", "long", "max", "mean", "median", "min", "norm",
    "numel", "relu", "round", "sigmoid", "sign", "size", "softmax", "sqrt", "square", "std", "sum", "t", "tanh", "topk",
    "var",
))  # fmt: skip

FIELDS = frozenset(("T", "mT", "dtype", "indices", "shape", "values"))
KEYWORDS = frozenset(("dim", "keepdim", "k", "largest", "min", "max", "descending"))

BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any] | Sized] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.MatMult: Sized(operator.matmul, _product),
}  # fmt: skip

COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
