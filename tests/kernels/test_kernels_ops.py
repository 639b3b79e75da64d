"""The registration of the operators: what torch's compiler is told about them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from djinn_fx.errors import InternalError
from djinn_fx.kernels import ops
from tests.kernels.attention_cases import make_case, same_bits

OPS = torch.ops.djinn


def written(op: Any) -> list[str]:
    return [arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]


def test_schemas_say_what_is_written() -> None:
    assert written(OPS.mark.default) == []
    assert written(OPS.attention.default) == []
    assert written(OPS.kv_write.default) == ["k_arena", "v_arena"]


def test_second_import_and_reload_leave_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.reload(ops)
    assert ops.__file__ is not None
    spec = importlib.util.spec_from_file_location("ops_under_another_name", ops.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert OPS.mark(torch.ones(2), "x").tolist() == [1.0, 1.0]


def test_mark_copies() -> None:
    x = torch.randn(3, 4).t()
    out = OPS.mark(x, "resid_post.0")
    assert same_bits(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert out.stride() == x.stride()


def step_args() -> dict[Any, tuple[Any, ...]]:
    case = make_case([(0, 5), (3, 6), (0, 0)], window=4, sinks=True)
    k, v = torch.randn(3, 2, 5, 16), torch.randn(3, 2, 5, 16)
    # Comparisons do not take NaN for equal.
    arenas = [arena.nan_to_num(7.0) for arena in (case.k_arena, case.v_arena)]
    return {
        OPS.mark.default: (torch.randn(2, 3), "embed"),
        OPS.kv_write.default: (*arenas, k, v, case.rows, case.positions, case.lengths),
        OPS.attention.default: (case.q.nan_to_num(7.0), *arenas, *case.args()[3:]),
    }


@pytest.mark.parametrize("op", list(step_args()), ids=str)
def test_schema_and_fake_agree_with_what_the_operator_does(op: Any) -> None:
    torch.library.opcheck(
        op, step_args()[op], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


class Step(nn.Module):
    """A layer's cache write and attention, marked."""

    def forward(
        self,
        q: Tensor,
        k_arena: Tensor,
        v_arena: Tensor,
        rows: Tensor,
        positions: Tensor,
        lengths: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        OPS.kv_write(k_arena, v_arena, k, v, rows, positions, lengths)
        out = OPS.attention(q, k_arena, v_arena, rows, positions, lengths, None, None, None, 0.25)
        return OPS.mark(out, "attn_z.0") * 2  # type: ignore[no-any-return]


def test_export_keeps_the_operators_and_their_order() -> None:
    case = make_case([(0, 5), (3, 6), (0, 0)])
    k, v = torch.randn(3, 2, 5, 16), torch.randn(3, 2, 5, 16)

    def args() -> tuple[Any, ...]:
        return (case.q, case.k_arena.clone(), case.v_arena.clone(), *case.args()[3:6], k, v)

    with torch.no_grad():
        program = torch.export.export(Step(), args(), strict=False)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert [name for name in names if name.startswith("djinn")] == [
            "djinn.kv_write.default",
            "djinn.attention.default",
            "djinn.mark.default",
        ]
        eager, captured, compiled = args(), args(), args()
        wanted = Step()(*eager)
        assert same_bits(program.module()(*captured), wanted)
        functional = torch.compile(Step(), backend="aot_eager", fullgraph=True)
        assert same_bits(functional(*compiled), wanted)
    rows = case.rows[:2]
    for other in (captured, compiled):
        for arena, expected in zip(other[1:3], eager[1:3], strict=True):
            assert same_bits(arena[rows], expected[rows])


def test_fakes_refuse_what_does_not_fit() -> None:
    args = step_args()
    with torch.device("meta"):
        q, *rest = (arg.to("meta") if isinstance(arg, Tensor) else arg for arg in args[OPS.attention.default])
        with pytest.raises(InternalError, match="do not fit the arenas"):
            OPS.attention(q[:, :3], *rest)
        k_arena, v_arena, k, *rest = (arg.to("meta") for arg in args[OPS.kv_write.default])
        with pytest.raises(InternalError, match="does not fit the arena"):
            OPS.kv_write(k_arena, v_arena, k.double(), *rest)
