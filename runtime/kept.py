"""Values of a site that a pass over a batch of prompts left behind, and their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Kept:
    """A site's values of a batch, chunk by chunk.

    Attributes:
        chunks: of each chunk the whole value ``[batch rows, query, *feature_shape]``, and how many tokens of it each
            prompt has. Nobody writes into it any more.
    """

    chunks: list[tuple[torch.Tensor, list[int]]] = field(default_factory=list)

    def rows(self) -> list[torch.Tensor]:
        """The value of each prompt, ``[tokens, *feature_shape]``; views where a prompt is one chunk."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.chunks[0][1]]
        for value, counts in self.chunks:
            for index, count in enumerate(counts):
                if count:
                    parts[index].append(value[index, :count])
        return [found[0] if len(found) == 1 else torch.cat(found) for found in parts]

    def whole(self, taken: set[int]) -> torch.Tensor | None:
        """The value of all prompts as the pass left it, if it is just that and nobody else has a part of it.

        Args:
            taken: addresses of memory that somebody has; what is handed out is added.
        """
        value, counts = self.chunks[0]
        if len(self.chunks) > 1 or list(value.shape[:2]) != [len(counts), counts[0]] or len(set(counts)) > 1:
            return None
        if len(counts) == 1:
            return None  # a copy costs little, and a module might have returned a table of its own
        memory = value.untyped_storage()
        if memory.nbytes() != value.nbytes or not value.is_contiguous() or memory.data_ptr() in taken:
            return None
        taken.add(memory.data_ptr())
        return value


#: Begins to move a value to where it is wanted, and returns what gives it there.
Send = Callable[[torch.Tensor], Callable[[], torch.Tensor]]


@contextmanager
def sending(target: torch.device | str | None, dtype: torch.dtype | None, source: torch.device) -> Iterator[Send]:
    """While entered, values are moved to a device and to a dtype.

    From a GPU to the host that goes on beside the work that follows: on a stream and a thread of its own, since a copy
    to ordinary memory holds up whoever asks for it.
    """
    if source.type != "cuda" or target is None or torch.device(target).type != "cpu":

        def now(value: torch.Tensor) -> Callable[[], torch.Tensor]:
            moved = value.to(target, dtype)
            return lambda: moved

        yield now
        return
    stream = torch.cuda.Stream(source)
    with ThreadPoolExecutor(1, "djinn-values") as courier:

        def later(value: torch.Tensor) -> Callable[[], torch.Tensor]:
            there = value.to(dtype=dtype)
            return courier.submit(_to_host, there, torch.cuda.current_stream(source).record_event(), stream).result

        yield later


def _to_host(value: torch.Tensor, ready: torch.cuda.Event, stream: torch.cuda.Stream) -> torch.Tensor:
    """Copy a value once it is computed; it is there when this returns, so its memory may be given to others."""
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        return value.to("cpu")
