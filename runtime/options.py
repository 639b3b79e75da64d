"""Fixed choices of one compiled model, and what is asked of a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer: Hugging Face's have it."""

    def __call__(self, text: str) -> Any:
        """Encode a text to a mapping with ``input_ids``."""

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text."""


@dataclass(frozen=True)
class EngineOptions:
    """Fixed choices of one compiled model.

    Attributes:
        max_sessions: KV rows.
        max_length: positions per session.
        prefill_chunk: prompt tokens per chunk.
        edit_rank: directions an edit may have.
        batch_invariant: decode always in the program of ``max_sessions`` rows.
        eos: tokens that end generation.
        vocab_size: tokens are below this.
        max_bucket: rows of the largest decode program.
        row_wait: seconds that a call waits at most for a row that another thread is using.
        chunk_step: factor between the sizes that prompt chunks are padded to.
        static: decode through programs over static buffers, on CUDA as CUDA graphs.
        pinned_bytes: most host memory that offloaded sessions and checkpoints in memory may take.
        disk_bytes: most bytes of files that sessions go to beyond it; 0: none.
        spill_dir: where those files are; None: the system's folder for temporary files.
    """

    max_sessions: int = 8
    max_length: int = 1024
    prefill_chunk: int = 512
    edit_rank: int = 4
    batch_invariant: bool = False
    eos: frozenset[int] = frozenset()
    vocab_size: int = 0
    max_bucket: int = 64
    pinned_bytes: int = 4 << 30
    disk_bytes: int = 0
    spill_dir: str | None = None
    row_wait: float = 30.0
    chunk_step: int = 2
    static: bool = False
