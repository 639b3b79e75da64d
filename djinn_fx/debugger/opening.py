"""Loading and compiling what the debugger debugs."""

from __future__ import annotations

import torch

from djinn_fx import bundled
from djinn_fx.api import compile as djinn_compile
from djinn_fx.dj import Dj


def open_model(reference: str | None) -> tuple[Dj, str]:
    """The compiled model of a path or hub id (None: the bundled one), and a prompt to begin with.

    Raises:
        OSError: transformers cannot find it.
        CaptureError, CaptureMismatch: it cannot be compiled.
    """
    if reference is None:
        torch.set_num_threads(1)  # a model this small runs fastest on one
    model, tokenizer = bundled.load(reference or str(bundled.PATH))
    if torch.cuda.is_available():
        model = model.to("cuda")
    known = getattr(model.config, "max_position_embeddings", None)
    length = min(1024, known) if isinstance(known, int) else 1024
    dj = djinn_compile(model, tokenizer=tokenizer, max_length=length)
    return dj, bundled.contrast().gloomy[0] if reference is None else "The"
