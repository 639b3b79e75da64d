"""The state machine as tests: one of each compiled model, with its share of the examples."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.errors import FlakyStrategyDefinition

from tests.backends import BACKEND
from tests.families import CHUNK
from tests.runtime.machine import BEGAN, SECONDS, Stage, TimeUpError
from tests.runtime.progress import forget, report
from tests.runtime.setups import Setup

EXAMPLES = int(os.environ.get("DJINN_STATE_EXAMPLES", "200"))

_MADE: dict[Setup, Any] = {}


def machine(
    base: type[Stage],
    name: str,
    share: int,
    *,
    invariant: bool = False,
    chunk: int = CHUNK,
    backend: str = "eager",
    tight: bool = False,
    poison: bool = False,
) -> Any:
    """The test of one model; ``share`` of the examples in percent.

    ``DJINN_TEST_BACKEND`` has the last word. Two tests that it makes equal become one, with both shares: None is
    returned for the second.
    """
    choice = Setup(name, invariant, chunk, BACKEND or backend, tight, poison)
    known = _MADE.get(choice)
    if known is not None:
        known.settings = _settings(known.settings.max_examples + _count(share))
        return None
    made: Any = type(f"{base.__name__} {choice}", (base,), {"setup": choice, "seen": Counter()})
    given: Any = made.TestCase

    class Case(given):  # type: ignore[misc]
        """Says at the end how many examples there were."""

        settings = _settings(_count(share))

        def runTest(self) -> None:
            begun = time.monotonic()
            if begun - BEGAN > SECONDS:
                pytest.skip("no time is left")
            try:
                super().runTest()
            except (TimeUpError, FlakyStrategyDefinition):
                if time.monotonic() - BEGAN <= SECONDS or not made.seen["examples"]:
                    raise
            finally:
                print(report(choice, made.seen, time.monotonic() - begun))
                if not isinstance(sys.exception(), KeyboardInterrupt):  # else nobody reads what was printed
                    forget(choice)

    _MADE[choice] = Case
    return Case


def _count(share: int) -> int:
    return max(1, EXAMPLES * share // 100)


def _settings(examples: int) -> settings:
    return settings(max_examples=examples, stateful_step_count=24, suppress_health_check=list(HealthCheck))
