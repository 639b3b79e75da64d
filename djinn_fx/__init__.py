"""Breakpoints for compiled transformers: stop, look, edit, fork, rewind and resume inside a forward pass.

import djinn_fx as djinn

dj = djinn.compile(model)
with dj.session() as s:
for stop in s.generate(prompt, max_new_tokens=16, breakpoints=["resid_post.6"]):
stop.value.mul_(0.9)
"""

from djinn_fx import when
from djinn_fx._version import __version__
from djinn_fx.api import Dj, check, compile
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
from djinn_fx.specs import Breakpoint, Edit, Feature, Support, break_at

__all__ = [
    "Breakpoint",
    "CapacityError",
    "CaptureError",
    "CaptureMismatch",
    "CheckpointError",
    "Dj",
    "DjModule",
    "DjinnError",
    "Edit",
    "Feature",
    "InternalError",
    "InvalidPredicate",
    "InvalidValue",
    "SessionBusy",
    "SessionClosed",
    "SiteNotCompiled",
    "StaleStop",
    "Support",
    "UnknownSite",
    "__version__",
    "break_at",
    "check",
    "compile",
    "when",
]
