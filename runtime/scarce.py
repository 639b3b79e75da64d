"""Memory that runs out: what a session cannot have becomes a :class:`CapacityError`, and costs nobody else anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from djinn_fx.errors import CapacityError, DjinnError

#: How things stand where a call found no memory.
UNCHANGED = "Nothing changed, and every session can go on"


@contextmanager
def memory_for(what: str, after: str = UNCHANGED) -> Iterator[None]:
    """Inside, memory that the device or the system refuses is a :class:`CapacityError`; the caller undoes its work.

    Args:
        what: what it is needed for.
        after: how things stand where there is none.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # No name for the new error: a frame that keeps one is kept by it, with all that lies in the frames below.
        if not lacks_memory(error):
            raise
        raise no_memory(error, what, after) from error


def lacks_memory(error: Exception) -> bool:
    """Whether an error is to become a :class:`CapacityError`."""
    return not isinstance(error, DjinnError) and out_of_memory(error)


def no_memory(error: Exception, what: str, after: str = UNCHANGED) -> CapacityError:
    """What :func:`memory_for` raises for an error that :func:`lacks_memory`."""
    said = str(error).partition("\n")[0][:200]
    return CapacityError(
        f"there is no memory for {what} ({type(error).__name__}: {said}). {after}. Free memory (del tensors, "
        "torch.cuda.empty_cache()), or compile with smaller limits."
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator has no class of its own for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
