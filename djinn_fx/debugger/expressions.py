"""Expressions of the debugger: a whitelist over Python's syntax tree and torch; never ``eval``.

An expression names ``h`` and a few things beside it, calls listed functions and tensor methods, indexes, computes and
compares. :func:`translate` gives the Python line that means the same, which is what the debugger echoes.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from djinn_fx.errors import InvalidValue

MAX_SOURCE, MAX_NODES, MAX_ELEMENTS, MAX_NUMBER = 500, 200, 1 << 24, 1 << 63


class ExpressionError(InvalidValue):
    """An expression that is malformed, not allowed, or failed; ``column`` is 1-based."""

    def __init__(self, message: str, column: int) -> None:
        super().__init__(f"column {column}: {message}")
        self.column = column


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


#: Functions by name: what is called, and how Python says it.
FUNCTIONS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "norm": (torch.linalg.vector_norm, "torch.linalg.vector_norm"),
    "cosine": (_cosine, "torch.nn.functional.cosine_similarity"),
    **{
        name: (getattr(torch, name), f"torch.{name}")
        for name in [
            "abs",
            "argmax",
            "argmin",
            "exp",
            "isfinite",
            "isnan",
            "log",
            "max",
            "mean",
            "median",
            "min",
            "sigmoid",
            "sign",
            "softmax",
            "sqrt",
            "std",
            "sum",
            "tanh",
            "topk",
            "var",
        ]
    },
}
METHODS = frozenset(
    [
        "abs",
        "all",
        "any",
        "argmax",
        "argmin",
        "bool",
        "clamp",
        "clone",
        "cumsum",
        "dim",
        "double",
        "exp",
        "flatten",
        "float",
        "isfinite",
        "isinf",
        "isnan",
        "item",
        "log",
        "log_softmax",
        "long",
        "max",
        "mean",
        "median",
        "min",
        "norm",
        "numel",
        "relu",
        "round",
        "sigmoid",
        "sign",
        "size",
        "softmax",
        "sqrt",
        "square",
        "std",
        "sum",
        "t",
        "tanh",
        "topk",
        "var",
    ]
)
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


def parse(source: str) -> ast.expr:
    """The syntax tree of an expression, bounded in size.

    Raises:
        ExpressionError: it is empty, too long, or not an expression.
    """
    text = source.strip()
    if not text or len(text) > MAX_SOURCE:
        raise ExpressionError(f"give an expression of 1 to {MAX_SOURCE} characters.", 1)
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"not an expression: {error.msg}.", error.offset or len(text) + 1) from None
    except (ValueError, RecursionError, MemoryError):
        raise ExpressionError("not an expression, or nested too deeply.", 1) from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise ExpressionError(f"more than {MAX_NODES} parts; make it shorter.", 1)
    return tree


def evaluate(source: str | ast.expr, names: Mapping[str, Any]) -> Any:
    """The value of an expression where ``names`` are what it may name.

    Raises:
        ExpressionError: with the column.
    """
    return _Evaluator(names).value(parse(source) if isinstance(source, str) else source)


class _Evaluator:
    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    def value(self, node: ast.AST) -> Any:
        rule = getattr(self, f"_{type(node).__name__}", None)
        if rule is None:
            raise _refused(node, f"{type(node).__name__} is not allowed in an expression.")
        try:
            return _checked(rule(node))
        except ExpressionError:
            raise
        except Exception as error:
            raise _refused(
                node, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from None

    def _Constant(self, node: ast.Constant) -> Any:
        if node.value is not None and not isinstance(node.value, (bool, int, float)):
            raise _refused(node, "only numbers, True, False and None.")
        return node.value

    def _Name(self, node: ast.Name) -> Any:
        if node.id in self.names:
            return self.names[node.id]
        raise _refused(node, f"unknown name {node.id!r}; known: {', '.join(sorted(self.names))}.")

    def _Tuple(self, node: ast.Tuple | ast.List) -> Any:
        return tuple(self.value(item) for item in node.elts)

    def _List(self, node: ast.List) -> Any:
        return list(self._Tuple(node))

    def _Slice(self, node: ast.Slice) -> slice:
        parts = [None if part is None else self.value(part) for part in (node.lower, node.upper, node.step)]
        return slice(*parts)

    def _UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = _arithmetic(node, self.value(node.operand))
        if isinstance(node.op, ast.Not):
            return value.logical_not() if isinstance(value, torch.Tensor) else not value
        if isinstance(node.op, ast.USub):
            return -value
        if isinstance(node.op, ast.UAdd):
            return +value
        raise _refused(node, "this operator is not allowed; for a negation write `not`.")

    def _BinOp(self, node: ast.BinOp) -> Any:
        left, right = (_arithmetic(node, self.value(side)) for side in (node.left, node.right))
        if type(node.op) not in BINARY:
            raise _refused(node, "this operator is not allowed; for logic write `and`, `or`, `not`.")
        if isinstance(node.op, ast.Pow) and not isinstance(left, torch.Tensor) and not isinstance(right, torch.Tensor):
            return math.pow(left, right)  # floats overflow at once, where ints would grow without end
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            _require_small(node, left, right)
        return BINARY[type(node.op)](left, right)

    def _Compare(self, node: ast.Compare) -> Any:
        sides = [_arithmetic(node, self.value(side)) for side in (node.left, *node.comparators)]
        result: Any = True
        for op, left, right in zip(node.ops, sides, sides[1:], strict=False):
            if type(op) not in COMPARE:
                raise _refused(node, "`is` and `in` are not allowed.")
            if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
                _require_small(node, left, right)
            result = _both(result, COMPARE[type(op)](left, right))
        return result

    def _BoolOp(self, node: ast.BoolOp) -> Any:
        join = _both if isinstance(node.op, ast.And) else _either
        values = [_arithmetic(node, self.value(part)) for part in node.values]
        result = values[0]
        for value in values[1:]:
            if isinstance(result, torch.Tensor) and isinstance(value, torch.Tensor):
                _require_small(node, result, value)
            result = join(result, value)
        return result

    def _Subscript(self, node: ast.Subscript) -> Any:
        base, index = self.value(node.value), self.value(node.slice)
        if not isinstance(base, (torch.Tensor, tuple, list)):
            raise _refused(node, "only tensors and tuples can be indexed.")
        if isinstance(base, torch.Tensor):
            for part in index if isinstance(index, tuple) else (index,):
                if isinstance(part, (torch.Tensor, list)):
                    count = part.numel() if isinstance(part, torch.Tensor) else len(part)
                    if count * base.numel() // max(1, base.shape[0] if base.dim() else 1) > MAX_ELEMENTS:
                        raise _refused(node, f"the result would have more than {MAX_ELEMENTS} elements.")
        return base[index]

    def _Attribute(self, node: ast.Attribute) -> Any:
        base = self.value(node.value)
        if node.attr not in FIELDS or not isinstance(base, (torch.Tensor, tuple)):
            raise _refused(node, f"no field {node.attr!r} here; fields: {', '.join(sorted(FIELDS))}.")
        return getattr(base, node.attr)

    def _Call(self, node: ast.Call) -> Any:
        arguments = [self.value(item) for item in node.args]
        for keyword in node.keywords:
            if keyword.arg not in KEYWORDS:
                raise _refused(keyword.value, f"keywords: {', '.join(sorted(KEYWORDS))}.")
        options = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            base = self.value(node.func.value)
            if node.func.attr not in METHODS or not isinstance(base, torch.Tensor):
                raise _refused(node.func, f"no method {node.func.attr!r} here; methods: {', '.join(sorted(METHODS))}.")
            return getattr(base, node.func.attr)(*arguments, **options)
        if isinstance(node.func, ast.Name):
            if node.func.id in FUNCTIONS:
                _require_small(node, *(a for a in arguments[:2] if isinstance(a, torch.Tensor)))
                return FUNCTIONS[node.func.id][0](*arguments, **options)
            found = self.names.get(node.func.id)
            if callable(found) and not isinstance(found, torch.Tensor):
                return found(*arguments, **options)
        raise _refused(node.func, f"not a function; functions: {', '.join(sorted(FUNCTIONS))}.")


def _refused(node: ast.AST, message: str) -> ExpressionError:
    return ExpressionError(message, getattr(node, "col_offset", 0) + 1)


def _arithmetic(node: ast.AST, value: Any) -> Any:
    if isinstance(value, (bool, int, float, torch.Tensor)):
        return value
    raise _refused(node, f"arithmetic takes numbers and tensors, not {type(value).__name__}.")


def _checked(value: Any) -> Any:
    """The value, unless it is a whole number that has grown beyond 64 bits or a tensor beyond the limit."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError("a whole number beyond 64 bits; write it as a float.")
    if isinstance(value, torch.Tensor) and value.numel() > MAX_ELEMENTS * 4:
        raise ValueError("a tensor too large to look at; index it first.")
    return value


def _require_small(node: ast.AST, *tensors: torch.Tensor) -> None:
    """Raise where what two tensors make together is too large; matrix products count as if all were kept."""
    if len(tensors) < 2:
        return
    left, right = tensors
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        rows = left.shape[:-1].numel() if left.dim() > 1 else 1
        size = rows * (right.numel() // right.shape[-2] if right.dim() > 1 and right.shape[-2] else 1)
    else:
        size = torch.broadcast_shapes(left.shape, right.shape).numel()
    if size > MAX_ELEMENTS:
        raise _refused(node, f"the result would have {size} elements; at most {MAX_ELEMENTS}.")


def _both(left: Any, right: Any) -> Any:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return _bool(left) & _bool(right)
    return bool(left) and bool(right)


def _either(left: Any, right: Any) -> Any:
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        return _bool(left) | _bool(right)
    return bool(left) or bool(right)


def _bool(value: Any) -> Any:
    return value.bool() if isinstance(value, torch.Tensor) else bool(value)
