"""The debugger's expressions: what they give, what they refuse, and the Python they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from djinn_fx.debugger.bounds import MAX_ELEMENTS, MAX_TOGETHER, Sized
from djinn_fx.debugger.conditions import predicate, predicate_python
from djinn_fx.debugger.expressions import ExpressionError, evaluate, explain

H = torch.arange(12.0).reshape(3, 4) - 5
NAMES: dict[str, Any] = {"h": H, "position": 2, "layer": 1, "norm": H[-1].norm()}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("1 + 2 * 3", 7),
        ("2 ** 3", 8),
        ("2 ** -1", 0.5),
        ("0 and h[99]", 0),
        ("3 or h[99]", 3),
        ("2 and 5", 5),
        ("not 0", 1),
        ("cosine(h[0], h[1])", float(torch.nn.functional.cosine_similarity(H[0], H[1], dim=-1))),
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
def test_values_and_the_python_that_gives_them(source: str, wanted: float) -> None:
    value, python = explain(source, NAMES, {})
    assert float(value) == pytest.approx(wanted)
    said = eval(python, {"torch": torch, **NAMES})  # a summary of that name is not in play here
    assert type(said) is type(value) and float(said) == float(value), python


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


LOGIC = [
    "not h", "not position", "h[0] > 0 and h[1] > 0 or not h[2] > 0", "position and h", "h and position", "layer or h",
    "1 < 2 < h", "-6 < h < 0 < position", "1 < position < layer", "h[0] and 0 or 1.5", "True and False or layer",
    "2**3**0 - -position", "(h, position)[0][1]", "h[:, [0, 2]]", "h[None, ..., 1:]", "h[h > 0]", "h.topk(2).values",
    "softmax(h, dim=-1)", "h.clamp(min=-1, max=h[0].max())", "h.shape", "(layer and 7) ** 2",
    "not (h[0] == 0).any() and position == 2", "0 == 0.0 == False", "norm(h, dim=1)", "max(h, dim=1).indices",
    "-h @ h.T", "0 or cosine(h[0], h[1]) > 0", "h[-1, 0] and layer or position", "False and undefined", "(h.T).mT",
]  # fmt: skip


@pytest.mark.parametrize("source", LOGIC)
def test_logic_is_what_python_makes_of_the_echoed_line(source: str) -> None:
    value, python = explain(source, NAMES, {})
    said = eval(python, {"torch": torch, **NAMES})
    assert type(said) is type(value), python
    if isinstance(value, torch.Tensor):
        assert value.dtype == said.dtype and torch.equal(value, said), python
    else:
        assert str(value) == str(said), python


X = torch.zeros(1 << 13)


@pytest.mark.parametrize(
    "source",
    [
        "x[:, None] + x",
        "x[:, None] > x",
        "x[:, None] @ x[None]",
        "x[:, None] > 0 and x > 0",
        "h[y]",
        "h[:, y, None][..., y]",
        "g[y[:, None], y]",
        "x.clamp(min=x[:, None])",
        "x.clamp(max=x[:, None])",
        "x.max(x[:, None])",
        "max(x, x[:, None])",
        "x[:, None] ** x",
        "cosine(x[:, None, None], x[:, None])",
        "unembed(x[:, None][:, y[:9]])",
        "cosine(w, w[:, 0])",
        "w[:, None] @ w[:, 0][:, :, None]",
    ],
)
def test_results_too_large_are_refused_before_they_are_made(source: str) -> None:
    made: list[int] = []

    def unembed(h: torch.Tensor) -> torch.Tensor:
        made.append(1)
        return h

    names = {
        "x": X, "h": torch.zeros(4, 1 << 12), "y": torch.zeros(1 << 13, dtype=torch.long), "g": torch.zeros(2, 2),
        "w": torch.zeros(1 << 12, 1, 64),
        "unembed": Sized(unembed, lambda h: h.numel() * 1000),
    }  # fmt: skip
    with pytest.raises(ExpressionError, match="elements"):
        evaluate(source, names)
    assert not made


@pytest.mark.parametrize(
    "source",
    [
        "h.repeat(10**9)", "h.expand(10**9, 3, 4)", "h.new_zeros(10**9)", "h.tile(10**9)", "h.repeat_interleave(10**9)",
        "h.unsqueeze(0)", "h.resize_(10**9)", "h.set_(h)", "h.outer(h)", "h.kron(h)", "h.tolist()", "zeros(10**9)",
        "h.new_full((10**9,), 0)", "h.index_select(0, h)", "(1,) * 10**9", "[1] * 10**9", "h.as_strided((9**9,), (0,))",
        "h.norm(dtype=h.dtype)", "set(h)", "list(h)", "h.__setitem__(0, 1)", "h.unfold(0, 1, 1)", "[h, h]",
    ],
)  # fmt: skip
def test_what_would_make_more_of_less_is_not_there(source: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(source, NAMES)


def test_results_together_are_bounded_too() -> None:
    names = {"h": torch.zeros(MAX_ELEMENTS)}
    count = MAX_TOGETHER // MAX_ELEMENTS
    assert len(evaluate(f"({', '.join(['h * 0'] * count)})", names)) == count
    with pytest.raises(ExpressionError, match="too large together"):
        evaluate(f"({', '.join(['h * 0'] * (count + 1))})", names)


def test_large_values_can_be_looked_at_in_part() -> None:
    names = {"h": torch.zeros(1).expand(MAX_ELEMENTS, 4)}
    assert evaluate("h[-1].sum() + h[3, 1]", names) == 0
    assert evaluate("h[:1000][h[:1000] > 1].numel()", names) == 0
    with pytest.raises(ExpressionError, match="elements"):
        evaluate("h * 2", names)


def test_a_condition_is_bounded_for_all_positions_together() -> None:
    many = torch.zeros(64, 1 << 9)
    with pytest.raises(ExpressionError, match="elements"):
        torch.func.vmap(predicate("(h[:, None] * h).sum() > 0"))(many)
    assert torch.func.vmap(predicate("(h[:8, None] * h).sum() > 0"))(many).sum() == 0


@pytest.mark.parametrize("source", ["(" * 400 + "1" + ")" * 400, "1+" * 240 + "1", "-" * 490 + "1", "1" * 501])
def test_long_and_deep_sources_are_refused(source: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "norm > 8", "h[0] > -3 and not max > 6", "-6 < h[0] < 0", "mean(h) > 0 or min < -4", "True", "h[2]", "not 0",
        "2**3 > 7 and std", "1 < 2 and h[0]", "cosine(h, h) > 0.5", "0", "h[0] and h[1] or 0", "h.shape[0] > 3 and std",
    ],
)  # fmt: skip
def test_a_predicate_and_its_python_agree_under_vmap(source: str) -> None:
    made = torch.func.vmap(predicate(source))(H)
    assert made.dtype == torch.bool and made.shape == (3,)
    python = predicate_python(source, torch.zeros(4))
    said = torch.func.vmap(eval(python, {"torch": torch}))(H)
    assert said.dtype == torch.bool and made.tolist() == said.tolist(), python


def test_a_predicate_refuses_what_it_does_not_see() -> None:
    with pytest.raises(ExpressionError, match="position") as caught:
        predicate("norm > 1 and position > 3")
    assert caught.value.column == 14
