"""How tests compile: on the backend that ``DJINN_TEST_BACKEND`` names, if it is set; else mostly on ``eager``.

``static`` is the decode loop of ``inductor`` over segments that are not compiled: its logic at the price of eager.
With ``DJINN_TEST_STREAM=1`` as many layers stream as can, in models of three layers or more (``DJINN_TEST_LAYERS``).
"""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import djinn_fx as djinn
from djinn_fx.passes.lower import lower_eager
from djinn_fx.runtime.placement import Placement, evenly, place

BACKEND = os.environ.get("DJINN_TEST_BACKEND", "")
STREAM = bool(os.environ.get("DJINN_TEST_STREAM"))


def least(model: Any) -> int:
    """The smallest ``weights_bytes`` that a model runs with: all its layers stream."""
    whole = place(model, None)
    count = len(whole.layers)
    return Placement(whole.layers, evenly(count, count), whole.base).device_bytes


def compile_model(model: Any, backend: str = BACKEND or "eager", **options: Any) -> djinn.Dj:
    """``djinn.compile`` on a backend, ``static`` among them."""
    dj: djinn.Dj
    if STREAM and "weights_bytes" not in options:
        options["weights_bytes"] = least(model)
    if backend != "static":
        dj = djinn.compile(model, backend=backend, **options)
        return dj
    with mock.patch("djinn_fx.dj.InductorLowering", lambda: lower_eager):
        dj = djinn.compile(model, backend="inductor", **options)
    return dj
