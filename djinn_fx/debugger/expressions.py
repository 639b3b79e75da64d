"""Expressions of the debugger: a whitelist over Python's syntax tree and torch; never ``eval``.

An expression names ``h`` and a few things beside it, calls listed functions and tensor methods, indexes, computes and
compares. What it means is what Python means, but that ``and``, ``or``, ``not`` and chained comparisons also take
tensors. Beside its value an expression yields the Python that gives the same, which is what the debugger echoes.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch

from djinn_fx.debugger.bounds import Budget, Sized
from djinn_fx.debugger.saying import Names, call_of, method_of, renamed
from djinn_fx.debugger.whitelist import BINARY, COMPARE, FIELDS, FUNCTIONS, KEYWORDS, METHODS
from djinn_fx.errors import InvalidValue

MAX_SOURCE, MAX_NODES, MAX_BITS = 500, 200, 64

#: A value, and the Python that gives it.
Found = tuple[Any, ast.expr]


class ExpressionError(InvalidValue):
    """An expression that is malformed, not allowed, or failed; ``column`` is 1-based."""

    def __init__(self, message: str, column: int) -> None:
        super().__init__(f"column {column}: {message}")
        self.column = column


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


def evaluate(source: str | ast.expr, names: Mapping[str, Any], budget: Budget | None = None) -> Any:
    """The value of an expression.

    Args:
        source: the expression.
        names: what it may name.
        budget: how large its results may be.

    Raises:
        ExpressionError: with the column.
    """
    return explain(source, names, {}, budget)[0]


def explain(
    source: str | ast.expr, names: Mapping[str, Any], python: Names, budget: Budget | None = None
) -> tuple[Any, str]:
    """The value of an expression, and the Python that gives it; ``python`` says how Python calls the names.

    Raises:
        ExpressionError: with the column.
    """
    tree = parse(source) if isinstance(source, str) else source
    value, said = _Evaluator(names, python, budget or Budget()).value(tree)
    return value, ast.unparse(ast.fix_missing_locations(said))


class _Evaluator:
    def __init__(self, names: Mapping[str, Any], python: Names, budget: Budget) -> None:
        self.names, self.python, self.budget = names, python, budget

    def value(self, node: ast.AST) -> Found:
        rule = getattr(self, f"_{type(node).__name__}", None)
        if rule is None:
            raise _refused(node, f"{type(node).__name__} is not allowed in an expression.")
        try:
            found: Found = rule(node)
            return _checked(found[0]), found[1]
        except ExpressionError:
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            raise _refused(node, f"{type(error).__name__}: {first}") from None

    def number(self, node: ast.AST) -> Found:
        """The value of a part that is computed with."""
        value, said = self.value(node)
        if isinstance(value, (bool, int, float, torch.Tensor)):
            return value, said
        raise _refused(node, f"arithmetic takes numbers and tensors, not {type(value).__name__}.")

    def _Constant(self, node: ast.Constant) -> Found:
        if node.value is not None and node.value is not ... and not isinstance(node.value, (bool, int, float)):
            raise _refused(node, "only numbers, True, False, None and `...`.")
        return node.value, node

    def _Name(self, node: ast.Name) -> Found:
        if node.id in self.names:
            return self.names[node.id], renamed(node, self.python)
        if node.id in FUNCTIONS:
            raise _refused(node, f"{node.id!r} is a function here, and takes a value: {node.id}(h[-1]).")
        known = ", ".join(sorted({*self.names, *self.python}))
        raise _refused(node, f"unknown name {node.id!r}; known: {known}; functions: {', '.join(sorted(FUNCTIONS))}.")

    def _Tuple(self, node: ast.Tuple) -> Found:
        parts = [self.value(item) for item in node.elts]
        return tuple(value for value, _ in parts), ast.Tuple([said for _, said in parts], ast.Load())

    def _List(self, node: ast.List) -> Found:
        parts = [self.value(item) for item in node.elts]
        if not all(isinstance(value, int) for value, _ in parts):
            raise _refused(node, "a list holds whole numbers, for an index.")
        return [value for value, _ in parts], ast.List([said for _, said in parts], ast.Load())

    def _Slice(self, node: ast.Slice) -> Found:
        parts = [None if part is None else self.value(part) for part in (node.lower, node.upper, node.step)]
        values = [None if part is None else part[0] for part in parts]
        return slice(*values), ast.Slice(*(None if part is None else part[1] for part in parts))

    def _UnaryOp(self, node: ast.UnaryOp) -> Found:
        value, said = self.number(node.operand)
        if isinstance(node.op, ast.Not):
            if isinstance(value, torch.Tensor):
                return self.budget.call(torch.logical_not, value), call_of("torch.logical_not", said)
            return not value, ast.UnaryOp(node.op, said)
        if isinstance(node.op, ast.USub):
            return self.budget.call(lambda x: -x, value), ast.UnaryOp(node.op, said)
        if isinstance(node.op, ast.UAdd):
            return +value, ast.UnaryOp(node.op, said)
        raise _refused(node, "this operator is not allowed; for a negation write `not`.")

    def _BinOp(self, node: ast.BinOp) -> Found:
        (left, left_said), (right, right_said) = self.number(node.left), self.number(node.right)
        if type(node.op) not in BINARY:
            raise _refused(node, "this operator is not allowed; for logic write `and`, `or`, `not`.")
        whole = isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int)
        if whole and abs(left) > 1 and right * math.log2(abs(left)) > MAX_BITS:
            raise _refused(node, "a whole number beyond 64 bits; write it as a float, such as 2.0**70.")
        return self.budget.call(BINARY[type(node.op)], left, right), ast.BinOp(left_said, node.op, right_said)

    def _Compare(self, node: ast.Compare) -> Found:
        sides = [self.number(side) for side in (node.left, *node.comparators)]
        values, said = [value for value, _ in sides], [python for _, python in sides]
        for op in node.ops:
            if type(op) not in COMPARE:
                raise _refused(node, "`is` and `in` are not allowed.")
        pairs = list(zip(node.ops, values, values[1:], strict=False))
        made = [self.budget.call(COMPARE[type(op)], left, right) for op, left, right in pairs]
        if len(made) == 1 or not any(isinstance(value, torch.Tensor) for value in made):
            return all(made) if len(made) > 1 else made[0], ast.Compare(said[0], node.ops, said[1:])
        result, python = made[0], _pair(node, said, 0)
        for index, value in enumerate(made[1:], start=1):
            result = self.budget.call(operator.and_, result, value)
            python = ast.BinOp(python, ast.BitAnd(), _pair(node, said, index))
        return result, python

    def _BoolOp(self, node: ast.BoolOp) -> Found:
        result, said = self.number(node.values[0])
        both = isinstance(node.op, ast.And)
        for part in node.values[1:]:
            if not isinstance(result, torch.Tensor) and bool(result) is not both:
                said = ast.BoolOp(node.op, [said, renamed(part, self.python)])  # Python does not look at it either
                continue
            value, python = self.number(part)
            if isinstance(result, torch.Tensor):
                (result, said), (value, python) = _truth(result, said), _truth(value, python)
                result = self.budget.call(operator.and_ if both else operator.or_, result, value)
                said = ast.BinOp(said, ast.BitAnd() if both else ast.BitOr(), python)
            else:
                result, said = value, ast.BoolOp(node.op, [said, python])
        return result, said

    def _Subscript(self, node: ast.Subscript) -> Found:
        (base, said), (index, place) = self.value(node.value), self.value(node.slice)
        if not isinstance(base, (torch.Tensor, tuple, list)):
            raise _refused(node, "only tensors and tuples can be indexed.")
        value = self.budget.index(base, index) if isinstance(base, torch.Tensor) else base[index]
        return value, ast.Subscript(said, place, ast.Load())

    def _Attribute(self, node: ast.Attribute) -> Found:
        base, said = self.value(node.value)
        if node.attr not in FIELDS or not isinstance(base, (torch.Tensor, tuple)):
            raise _refused(node, f"no field {node.attr!r} here; fields: {', '.join(sorted(FIELDS))}.")
        return getattr(base, node.attr), ast.Attribute(said, node.attr, ast.Load())

    def _Call(self, node: ast.Call) -> Found:
        arguments = [self.value(item) for item in node.args]
        for keyword in node.keywords:
            if keyword.arg not in KEYWORDS:
                raise _refused(keyword.value, f"keywords: {', '.join(sorted(KEYWORDS))}.")
        named = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        values, options = [value for value, _ in arguments], {name: value for name, (value, _) in named.items()}
        said = [python for _, python in arguments], {name: python for name, (_, python) in named.items()}
        if isinstance(node.func, ast.Attribute):
            base, python = self.value(node.func.value)
            method = node.func.attr
            if method not in METHODS or not isinstance(base, torch.Tensor):
                raise _refused(node.func, f"no method {method!r} here; methods: {', '.join(sorted(METHODS))}.")
            called = getattr(torch.Tensor, method)
            return self.budget.call(called, base, *values, **options), method_of(python, method, *said)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in FUNCTIONS:
            function, form = FUNCTIONS[name]
            return self.budget.call(function, *values, **options), call_of(form, *said[0], **said[1])
        found = self.names.get(name)
        if isinstance(found, Sized):
            return self.budget.call(found, *values, **options), call_of(
                self.python.get(name, name), *said[0], **said[1]
            )
        raise _refused(node.func, f"not a function; functions: {', '.join(sorted(FUNCTIONS))}.")


def _pair(node: ast.Compare, said: list[ast.expr], index: int) -> ast.expr:
    return ast.Compare(said[index], [node.ops[index]], [said[index + 1]])


def _truth(value: Any, said: ast.expr) -> Found:
    """A value as true or false."""
    if isinstance(value, torch.Tensor):
        return (value, said) if value.dtype == torch.bool else (value.bool(), method_of(said, "bool", [], {}))
    return (value, said) if isinstance(value, bool) else (bool(value), call_of("bool", said))


def _refused(node: ast.AST, message: str) -> ExpressionError:
    return ExpressionError(message, getattr(node, "col_offset", 0) + 1)


def _checked(value: Any) -> Any:
    """The value, unless it is a whole number that has grown beyond 64 bits."""
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("a whole number beyond 64 bits; write it as a float.")
    return value
