"""Python syntax trees for the lines that the debugger echoes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping

from djinn_fx.debugger.whitelist import FUNCTIONS

#: How Python says the names of an expression, such as ``{"h": "stop1.value"}``.
Names = Mapping[str, str]


def expression(text: str) -> ast.expr:
    """The tree of a piece of Python of our own."""
    return ast.parse(text, mode="eval").body


def call_of(form: str, *args: ast.expr, **options: ast.expr) -> ast.expr:
    """A call of the function ``form``; or ``form`` itself, with the arguments in the places ``{0}`` and on."""
    if "{" in form:
        return expression(form.format(*(f"({ast.unparse(ast.fix_missing_locations(copy.deepcopy(a)))})" for a in args)))
    return ast.Call(expression(form), list(args), [ast.keyword(name, value) for name, value in options.items()])


def method_of(base: ast.expr, method: str, args: list[ast.expr], options: Mapping[str, ast.expr]) -> ast.expr:
    """A call of a method."""
    keywords = [ast.keyword(name, value) for name, value in options.items()]
    return ast.Call(ast.Attribute(base, method, ast.Load()), args, keywords)


def renamed(tree: ast.expr, names: Names) -> ast.expr:
    """A tree in Python's names, its logic as it stands: for what is a name, or is not evaluated."""
    found: ast.expr = _Renamer(names).visit(copy.deepcopy(tree))
    return found


class _Renamer(ast.NodeTransformer):
    def __init__(self, names: Names) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        text = self.names.get(node.id)
        return node if text is None else expression(text)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        known = FUNCTIONS.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if known is None:
            return self.generic_visit(node)
        args = [self.visit(item) for item in node.args]
        return call_of(known[1], *args, **{str(word.arg): self.visit(word.value) for word in node.keywords})
