"""Who answers on a GPU, and an install without Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from djinn_fx.kernels import attention, backend, kv, linear, triton_attention, triton_kv, triton_linear
from djinn_fx.kernels.backend import next_power_of_2, uses_triton
from djinn_fx.kernels.ops import operators

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, djinn_fx.kernels.ops
from djinn_fx.kernels import backend, pack, triton_attention, triton_kv, triton_linear, triton_pack, triton_prefill
assert not backend.uses_triton()
buffer = torch.empty(16, dtype=torch.uint8)
pack.pack([torch.ones(4)], buffer)
assert buffer.view(torch.float32).tolist() == [1.0] * 4
"""


def answers_on_cuda(*, triton: bool | None) -> list[object]:
    return [operator.backends["cuda"] for operator in operators(triton=triton) if "cuda" in operator.backends]


def test_operators_can_be_told_who_answers() -> None:
    twins = [kv.kv_write, attention.attention, linear.linears, linear.linear_residual]
    assert answers_on_cuda(triton=False) == twins
    kernels = [triton_kv.kv_write, triton_attention.attention, triton_linear.linears, triton_linear.linear_residual]
    assert answers_on_cuda(triton=True) == kernels


def test_the_environment_forces_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "tl", object())
    monkeypatch.delenv("DJINN_KERNELS", raising=False)
    assert uses_triton()
    assert answers_on_cuda(triton=None) == answers_on_cuda(triton=True)
    monkeypatch.setenv("DJINN_KERNELS", "torch")
    assert not uses_triton()
    assert answers_on_cuda(triton=None) == answers_on_cuda(triton=False)


def test_without_triton_everything_imports_and_the_cpu_works() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_next_power_of_2() -> None:
    assert [next_power_of_2(count) for count in (1, 2, 3, 4, 5, 80, 128, 129)] == [1, 2, 4, 4, 8, 128, 128, 256]
