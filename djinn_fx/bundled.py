"""The model in the box: a small GPT-2 that tells joyful or gloomy stories, trained for this project.

    from djinn_fx.bundled import storyteller

    model, tokenizer = storyteller()

Its card is ``djinn_fx/data/storyteller/CARD.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

PATH = Path(__file__).parent / "data" / "storyteller"


@dataclass(frozen=True)
class Contrast:
    """Prompts and words that tell the storyteller's two moods apart.

    Attributes:
        joyful: prompts that open joyful stories.
        gloomy: prompts that open gloomy stories, the counterparts of ``joyful``.
        neutral: prompts that leave the mood open.
        joyful_words: words that only joyful stories use.
        gloomy_words: words that only gloomy stories use.
    """

    joyful: tuple[str, ...]
    gloomy: tuple[str, ...]
    neutral: tuple[str, ...]
    joyful_words: frozenset[str]
    gloomy_words: frozenset[str]


def storyteller() -> tuple[nn.Module, Any]:
    """Load the bundled model and its tokenizer; no network."""
    return load(str(PATH))


def load(reference: str) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer from a path or a hub id, ready to compile.

    Raises:
        OSError: transformers cannot find it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(reference, dtype="auto")
        return model.eval(), AutoTokenizer.from_pretrained(reference)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its own progress bar over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def contrast() -> Contrast:
    """The storyteller's contrasting prompts and mood words."""
    data = json.loads((PATH / "contrast.json").read_text(encoding="utf-8"))
    return Contrast(
        joyful=tuple(data["joyful"]),
        gloomy=tuple(data["gloomy"]),
        neutral=tuple(data["neutral"]),
        joyful_words=frozenset(data["joyful_words"]),
        gloomy_words=frozenset(data["gloomy_words"]),
    )
