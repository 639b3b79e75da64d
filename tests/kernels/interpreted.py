"""Kernel files loaded for Triton's interpreter: kernels then run on the CPU, in numpy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of a kernel file whose kernels are interpreted; skips the test without Triton.

    Triton decides when a kernel is decorated, so the copy that everyone else has stays compiled.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location(f"{name}_interpreted", KERNELS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
