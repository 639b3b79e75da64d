"""How a mistake is tested: its error, its session afterwards, and a bystander that must not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.run import Run
from djinn_fx.runtime.session import Session
from tests.runtime.tiny import NEW, PROMPT, assert_same, compiled, generated, prompt

#: What is done wrong, with a session of its own; the error and a pattern of its message.
Case = tuple[Callable[[djinn.Dj, Session], object], type[Exception], str]


def bystander(session: Session) -> Run:
    """A run that stands in the middle of a prompt with an edit pending."""
    at = djinn.break_at("resid_post.0", positions=(3, 21))
    run = session.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=[at])
    next(run).value.add_(1)
    return run


@cache
def undisturbed() -> Result:
    with compiled("llama").session() as s:
        return bystander(s).result()


def beside_another(dj: djinn.Dj) -> Iterator[djinn.Dj]:
    """Hand out a compiled model with another session in it, stopped; afterwards it must go on as if alone."""
    expected = undisturbed()
    with dj.session() as other:
        run = bystander(other)
        yield dj
        assert_same(run.result(), expected)


def fails(dj: djinn.Dj, case: Case) -> None:
    """The act fails as said; afterwards its session works as a new one does."""
    act, error, message = case
    with dj.session() as s:
        with pytest.raises(error, match=message) as caught:
            act(dj, s)
        assert isinstance(caught.value, djinn.DjinnError) and len(str(caught.value)) > 20
        if s.run is not None:
            s.run.close()
        if not s.tokens.numel():
            for site in dj.compiled_sites:
                s.drop_steering(site)
            result = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True).result()
            assert_same(result, generated(dj, prompt(PROMPT)))


def begin(s: Session, *breakpoints: Any, **options: Any) -> Run:
    chosen: Any = {"max_new_tokens": 2, "breakpoints": breakpoints} | options
    return s.generate(prompt(4), **chosen)
