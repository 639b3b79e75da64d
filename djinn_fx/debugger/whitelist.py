"""What expressions of the debugger may call, read and compute with."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


#: Functions by name: what is called, and how Python says it; ``{0}`` and on stand for the arguments, if there are any.
FUNCTIONS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "norm": (torch.linalg.vector_norm, "torch.linalg.vector_norm"),
    "cosine": (_cosine, "torch.nn.functional.cosine_similarity({0}.float(), {1}.float(), dim=-1)"),
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

BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
}  # fmt: skip

COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
