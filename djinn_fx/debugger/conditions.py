"""Conditions of breakpoints, and the names that stand for a summary of the activation."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

import torch

from djinn_fx.debugger.bounds import Budget
from djinn_fx.debugger.expressions import ExpressionError, evaluate, explain, parse

#: Summaries of the activation by bare name, as Python on ``{h}``, one position's value.
SUMMARIES: Mapping[str, str] = {
    "norm": "torch.linalg.vector_norm({h}.float())",
    "mean": "{h}.float().mean()",
    "max": "{h}.float().max()",
    "min": "{h}.float().min()",
    "std": "{h}.float().std()",
}

#: Most elements of a result in a condition, where that is more than twice its ``h``: a prompt's positions are looked
#: at all at once, so memory for hundreds of them is taken.
MAX_AT_A_POSITION = 1 << 14

Predicate = Callable[[torch.Tensor], torch.Tensor]


def predicate(source: str) -> Predicate:
    """A ``when=`` for :func:`djinn_fx.break_at`: one position's ``[hidden]`` to a 0-d bool, fit for ``vmap``.

    Raises:
        ExpressionError: it cannot be read, or names what a predicate does not see.
    """
    tree = parse(source)
    known = {"h", *SUMMARIES}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) not in called and node.id not in known:
            raise ExpressionError(
                f"a condition sees one position's h and {', '.join(SUMMARIES)}; it does not know {node.id!r}.",
                node.col_offset + 1,
            )

    def when(h: torch.Tensor) -> torch.Tensor:
        answer = evaluate(tree, {"h": h, **summaries(tree, h)}, _budget(h))
        if not isinstance(answer, torch.Tensor):
            return torch.full_like(h.flatten()[0], bool(answer), dtype=torch.bool)
        return answer.bool()

    return when


def predicate_python(source: str, h: torch.Tensor) -> str:
    """The Python of :func:`predicate`, for values that are such as ``h``.

    Raises:
        ExpressionError: it fails on ``h``.
    """
    tree = parse(source)
    python = {name: form.format(h="h") for name, form in SUMMARIES.items()}
    answer, said = explain(tree, {"h": h, **summaries(tree, h)}, python, _budget(h))
    if not isinstance(answer, torch.Tensor):
        return f"lambda h: torch.full_like(h.flatten()[0], {said}, dtype=torch.bool)"
    return f"lambda h: {said}" if answer.dtype == torch.bool else f"lambda h: ({said}).bool()"


def _budget(h: torch.Tensor) -> Budget:
    each = max(MAX_AT_A_POSITION, 2 * h.numel())
    return Budget(each, 16 * each)


def summaries(tree: ast.AST, h: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of :data:`SUMMARIES` that the tree names, of one position's ``h``."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & set(SUMMARIES)
    wide = h.float()
    make: dict[str, Callable[[], torch.Tensor]] = {
        "norm": lambda: torch.linalg.vector_norm(wide), "mean": wide.mean, "max": wide.max, "min": wide.min,
        "std": wide.std,
    }  # fmt: skip
    return {name: make[name]() for name in used}
