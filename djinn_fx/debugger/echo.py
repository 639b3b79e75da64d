"""The Python that an expression of the debugger stands for."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping

from djinn_fx.debugger.conditions import SUMMARIES
from djinn_fx.debugger.expressions import FUNCTIONS, parse


def translate(source: str, names: Mapping[str, str], h: str) -> str:
    """``source`` in plain Python over torch.

    Args:
        source: an expression of the debugger.
        names: how Python says a name (``{"h": "stop1.value"}``).
        h: how Python says one position's value, for ``norm`` and its siblings.
    """
    tree = _Translator({**{k: v.format(h=h) for k, v in SUMMARIES.items()}, **names}).visit(
        copy.deepcopy(parse(source))
    )
    return ast.unparse(ast.fix_missing_locations(tree))


class _Translator(ast.NodeTransformer):
    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            node.func = ast.parse(FUNCTIONS[node.func.id][1], mode="eval").body
        else:
            node.func = self.visit(node.func)
        node.args = [self.visit(item) for item in node.args]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        text = self.names.get(node.id)
        return node if text is None else ast.parse(text, mode="eval").body

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        # `and` asks for a tensor's truth at once, which a predicate under vmap cannot tell.
        op: ast.operator = ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr()
        parts = [self.visit(part) for part in node.values]
        result: ast.expr = parts[0]
        for part in parts[1:]:
            result = ast.BinOp(result, op, part)
        return result

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        sides = [self.visit(side) for side in (node.left, *node.comparators)]
        pairs = [ast.Compare(a, [op], [b]) for a, op, b in zip(sides, node.ops, sides[1:], strict=False)]
        result: ast.expr = pairs[0]
        for pair in pairs[1:]:
            result = ast.BinOp(result, ast.BitAnd(), pair)
        return result

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        inner = self.visit(node.operand)
        if not isinstance(node.op, ast.Not):
            return ast.UnaryOp(node.op, inner)
        return ast.Call(ast.parse("torch.logical_not", mode="eval").body, [inner], [])
