"""How tests compile: on the backend that ``DJINN_TEST_BACKEND`` names, if it is set; else mostly on ``eager``.

``static`` is the decode loop of ``inductor`` over segments that are not compiled: its logic at the price of eager.
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import djinn_fx as djinn
from djinn_fx.passes.lower import lower_eager

BACKEND = os.environ.get("DJINN_TEST_BACKEND", "")


def compile_model(model: Any, backend: str = BACKEND or "eager", **options: Any) -> djinn.Dj:
    """``djinn.compile`` on a backend, ``static`` among them."""
    dj: djinn.Dj
    if backend != "static":
        dj = djinn.compile(model, backend=backend, **options)
        return dj
    with mock.patch("djinn_fx.dj.InductorLowering", lambda: lower_eager):
        dj = djinn.compile(model, backend="inductor", **options)
    return dj
