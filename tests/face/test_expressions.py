"""The debugger's expressions: what they give, what they refuse, and the Python they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from djinn_fx.debugger.conditions import predicate
from djinn_fx.debugger.echo import translate
from djinn_fx.debugger.expressions import ExpressionError, evaluate

H = torch.arange(12.0).reshape(3, 4) - 5
NAMES: dict[str, Any] = {"h": H, "position": 2, "layer": 1, "norm": H[-1].norm()}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("1 + 2 * 3", 7),
        ("2 ** 3", 8.0),
        ("-h[0, 0]", 5.0),
        ("h[-1].norm()", float(H[-1].norm())),
        ("norm", float(H[-1].norm())),
        ("norm(h[0])", float(H[0].norm())),
        ("h.max(0).values[1]", 4.0),
        ("h.shape[1]", 4),
        ("h[1:, ::2].sum()", float(H[1:, ::2].sum())),
        ("not position > 3", 1),
        ("1 < position < 3", 1),
        ("position == 2 and layer == 0 or layer == 1", 1),
        ("h[[0, 2]].mean(dim=1)[0]", float(H[0].mean())),
        ("topk(h[-1], 1).indices[0]", 3),
        ("(h @ h.T).shape[0]", 3),
    ],
)
def test_values(source: str, wanted: float) -> None:
    assert float(evaluate(source, NAMES)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("source", "column"),
    [
        ("", 1),
        ("1 +", 4),
        ("h.__class__", 1),
        ("h.data", 1),
        ("h.numpy()", 1),
        ("h.fill_(0)", 1),
        ("h.apply_(abs)", 10),
        ("h.register_hook(abs)", 17),
        ("().__class__.__bases__", 1),
        ("1 + open", 5),
        ("__import__", 1),
        ("__import__(1)", 1),
        ("torch.save(h, 1)", 1),
        ("'a' * 9", 1),
        ("[0] * 9", 1),
        ("[x for x in h]", 1),
        ("lambda: 1", 1),
        ("(x := 1)", 2),
        ("f'{h}'", 1),
        ("h if 1 else h", 1),
        ("10 ** 10 ** 10", 1),
        ("9223372036854775807 * 9", 1),
        ("1 << 9", 1),
        ("h[9]", 1),
        ("h.norm(out=h)", 12),
        ("norm(*h)", 6),
        ("1 + 1 / 0", 5),
        ("h is h", 1),
    ],
)
def test_refusals_name_the_column(source: str, column: int) -> None:
    before = H.clone()
    with pytest.raises(ExpressionError) as caught:
        evaluate(source, NAMES)
    assert caught.value.column == column, caught.value
    assert torch.equal(H, before)


@pytest.mark.parametrize("source", ["x[:, None] + x", "x[:, None] > x", "x[:, None] @ x[None]", "h[y]"])
def test_results_too_large_are_refused_before_they_are_made(source: str) -> None:
    names = {"x": torch.zeros(1 << 13), "h": torch.zeros(4, 1 << 12), "y": torch.zeros(1 << 13, dtype=torch.long)}
    with pytest.raises(ExpressionError, match="elements"):
        evaluate(source, names)


@pytest.mark.parametrize("source", ["(" * 400 + "1" + ")" * 400, "1+" * 240 + "1", "-" * 490 + "1", "1" * 501])
def test_long_and_deep_sources_are_refused(source: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(source, {})


@pytest.mark.parametrize(
    "source", ["norm > 8", "h[0] > -3 and not max > 6", "-6 < h[0] < 0", "mean(h) > 0 or min < -4", "True", "h[2]"]
)
def test_a_predicate_and_its_python_agree_under_vmap(source: str) -> None:
    made = torch.func.vmap(predicate(source))(H)
    assert made.dtype == torch.bool and made.shape == (3,)
    python = translate(source, {}, "h")
    said = [bool(eval(python, {"torch": torch, "h": row})) for row in H]
    assert made.tolist() == said


def test_a_predicate_refuses_what_it_does_not_see() -> None:
    with pytest.raises(ExpressionError, match="position") as caught:
        predicate("norm > 1 and position > 3")
    assert caught.value.column == 14
