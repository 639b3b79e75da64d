"""Breakpoints for compiled transformers: stop, look, edit, fork, rewind and resume inside a forward pass.

import djinn_fx as djinn

dj = djinn.compile(model)
with dj.session() as s:
for stop in s.generate(prompt, max_new_tokens=16, breakpoints=["resid_post.6"]):
stop.value.mul_(0.9)
"""

from djinn_fx import when
from djinn_fx._version import __version__
from djinn_fx.api import check, compile
from djinn_fx.diff import Place, RunDiff, diff
from djinn_fx.dj import Dj
from djinn_fx.errors import (
    CapacityError,
    CaptureError,
    CaptureMismatch,
    CheckpointError,
    DjinnError,
    InternalError,
    InvalidPredicate,
    InvalidValue,
    SessionBusy,
    SessionClosed,
    SiteNotCompiled,
    StaleStop,
    UnknownSite,
)
from djinn_fx.modules import DjModule
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.receipt import Receipt
from djinn_fx.runtime.results import Cache, Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from djinn_fx.runtime.steering import SteerHandle
from djinn_fx.runtime.stop import Stop
from djinn_fx.specs import Breakpoint, Edit, Feature, Support, break_at

__all__ = [
    "Breakpoint",
    "Cache",
    "CapacityError",
    "CaptureError",
    "CaptureMismatch",
    "Checkpoint",
    "CheckpointError",
    "Dj",
    "DjModule",
    "DjinnError",
    "Edit",
    "Feature",
    "InternalError",
    "InvalidPredicate",
    "InvalidValue",
    "Place",
    "Receipt",
    "Result",
    "Run",
    "RunDiff",
    "Session",
    "SessionBusy",
    "SessionClosed",
    "SiteNotCompiled",
    "StaleStop",
    "SteerHandle",
    "Stop",
    "Support",
    "UnknownSite",
    "__version__",
    "break_at",
    "check",
    "compile",
    "diff",
    "when",
]
