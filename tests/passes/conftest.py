"""Machines that many tests share; a machine's captures are kept, so that programs are cheap."""

from __future__ import annotations

import pytest

from tests.passes.tiny import Machine, tiny_model


@pytest.fixture(scope="session")
def gpt2() -> Machine:
    return Machine(tiny_model("gpt2"))


@pytest.fixture(scope="session")
def llama() -> Machine:
    return Machine(tiny_model("llama"))


@pytest.fixture(scope="session")
def opt() -> Machine:
    """Its MLP runs on ``[rows * query, width]``: sites in another layout."""
    return Machine(tiny_model("opt"))
