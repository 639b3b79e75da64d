"""A second process for ``test_cuda.py``: restore checkpoints of a model, go on, print what came out as JSON.

Its arguments are a model's name, its dtype and checkpoint files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import torch

from djinn_fx.runtime.session import Session
from tests.bits import bits
from tests.cuda_models import compiled


def outcome(session: Session) -> list[Any]:
    """Where a session's run stands, its tokens to the end, and a digest of every bit of its logits."""
    run = session.run
    assert run is not None
    assert run.stop is not None
    place = [run.stop.site, run.stop.position, hashlib.sha256(bits(run.stop.value).numpy().tobytes()).hexdigest()]
    result = run.result()
    assert result.logits is not None
    return [*place, result.tokens.tolist(), hashlib.sha256(bits(result.logits).numpy().tobytes()).hexdigest()]


if __name__ == "__main__":
    torch.set_num_threads(1)  # as tests/conftest.py
    dj = compiled(sys.argv[1], sys.argv[2], "few")
    print(json.dumps([outcome(dj.restore(path)) for path in sys.argv[3:]]))
