"""The model in the box: a small GPT-2 that tells joyful or gloomy stories, trained for this project.

    from djinn_fx.bundled import storyteller

    model, tokenizer = storyteller()

Its card is ``djinn_fx/data/storyteller/CARD.md``.
"""

from __future__ import annotations

import json
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

    model = AutoModelForCausalLM.from_pretrained(reference, dtype="auto")
    return model.eval(), AutoTokenizer.from_pretrained(reference)


def contrast() -> Contrast:
    """The storyteller's contrasting prompts and mood words."""
    data = json.loads((PATH / "contrast.json").read_text(encoding="utf-8"))
    words = data["words"]
    return Contrast(
        joyful=tuple(data["joyful"]),
        gloomy=tuple(data["gloomy"]),
        neutral=tuple(data["neutral"]),
        joyful_words=frozenset(words["joyful"]),
        gloomy_words=frozenset(words["gloomy"]),
    )
