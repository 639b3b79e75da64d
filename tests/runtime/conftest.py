"""Compiled models for the runtime's tests: shared by all of them, clean after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import djinn_fx as djinn
from tests.runtime.tiny import NAMES, another_dj, compiled, guarded


@pytest.fixture(params=("gpt2", "llama", "llama-bf16"))
def dj(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    """Each tiny model and one of them in bf16, compiled with the usual sites."""
    yield from guarded(compiled(request.param))


@pytest.fixture(params=NAMES)
def every(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    """Each tiny model in each dtype, compiled with every site."""
    yield from guarded(compiled(request.param, "every"))


@pytest.fixture(params=("gpt2", "llama"))
def both(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    """Both tiny models in fp32, compiled with every site."""
    yield from guarded(compiled(request.param, "every"))


@pytest.fixture
def one() -> Iterator[djinn.Dj]:
    """One tiny model, for what does not depend on the model."""
    yield from guarded(compiled("llama"))


@pytest.fixture(scope="module", params=["gpt2", "llama-bf16"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[djinn.Dj, djinn.Dj]]:
    """One model on the decode loop, and the same model step by step."""
    loop, steps = (another_dj(request.param, backend=name, batch_invariant=True) for name in ("static", "eager"))
    yield loop, steps
    loop.close()
    steps.close()
