"""The errors of djinn_fx: one tree under :class:`DjinnError`.

Every message says what happened, where, and what to do about it.
"""

from __future__ import annotations


class DjinnError(Exception):
    """The root of every error that djinn_fx raises on purpose."""


class UnknownSite(DjinnError, KeyError):
    """A site name that this model does not have; the message names the nearest ones."""

    def __str__(self) -> str:
        # KeyError would show the repr of the message: quotes and escapes around a sentence.
        return str(self.args[0]) if self.args else ""


class SiteNotCompiled(DjinnError):
    """A site that exists but was not compiled in; ``dj.add_sites`` compiles it."""


class CaptureError(DjinnError):
    """A model that cannot be captured as one static graph."""


class CaptureMismatch(DjinnError):
    """A captured model whose numbers differ from the eager model's beyond tolerance."""


class InvalidValue(DjinnError, ValueError):
    """A value of the wrong shape, dtype, device or range."""


class InvalidPredicate(DjinnError):
    """A breakpoint's ``when=`` that cannot be evaluated on one position's activation."""


class CapacityError(DjinnError, RuntimeError):
    """No row, no pinned memory or no length left."""


class CheckpointError(DjinnError):
    """A checkpoint that is damaged, or belongs to another model or environment."""


class StaleStop(DjinnError):
    """A stop whose run went on: its value can be read but no longer acted on."""


class SessionBusy(DjinnError):
    """A session that already has an unfinished run."""


class SessionClosed(DjinnError):
    """A session, run or model that was closed."""


class InternalError(DjinnError):
    """A broken invariant of djinn_fx itself: our bug, never the user's."""
