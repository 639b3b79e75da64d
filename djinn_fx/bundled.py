"""The model in the box: a small GPT-2 that tells joyful or gloomy stories, trained for this project.

    from djinn_fx.bundled import storyteller

    model, tokenizer = storyteller()

It knows 344 words and marks; any other becomes ``<unk>`` (:func:`unknown_words` tells which). Its card is
``djinn_fx/data/storyteller/CARD.md``.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from djinn_fx.errors import InvalidValue

PATH = Path(__file__).parent / "data" / "storyteller"

#: The name under which it is known.
NAME = "storyteller"


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

    ``"storyteller"`` is the bundled one.

    Raises:
        InvalidValue: transformers cannot find or read it; with the nearest names.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if reference == NAME and not Path(reference).exists():
        reference = str(PATH)
    with _no_progress_bar():
        try:
            model = AutoModelForCausalLM.from_pretrained(reference, dtype="auto")
            return model.eval(), AutoTokenizer.from_pretrained(reference)
        except (OSError, ValueError) as error:
            raise no_model(reference, error, [NAME]) from error


def no_model(reference: str, error: Exception, known: Sequence[str]) -> InvalidValue:
    """What is said of a model that transformers cannot load.

    Args:
        reference: the path or hub id.
        error: what transformers raised.
        known: names of models that are built in.
    """
    here = Path(reference).expanduser()
    near = difflib.get_close_matches(reference, known, n=2)
    near += [str(here.with_name(name)) for name in neighbours(here)]
    hint = f": nearest: {', '.join(near)}" if near else ""
    built_in = f"Built in: {', '.join(known)}; else give" if known else "Give"
    why = textwrap.shorten(str(error), 200, placeholder=" ...")
    return InvalidValue(
        f"no model {reference!r}{hint}. {built_in} a folder of transformers, or a hub id. transformers says: {why}"
    )


def neighbours(path: Path) -> list[str]:
    """Names beside a path that are like its own, which is not among them."""
    try:
        names = [each.name for each in path.parent.iterdir() if each.name != path.name]
    except OSError:
        return []
    return difflib.get_close_matches(path.name, names, n=3)


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The parts of a text that a tokenizer does not know, each once; it makes its unknown token of them."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not getattr(tokenizer, "is_fast", False):
        return []
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    parts = [text[start:end] for token, (start, end) in places if token == unknown]
    return list(dict.fromkeys(part.strip() or part for part in parts))


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
