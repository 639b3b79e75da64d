"""Checkpoints and breakpoints: which are saved, which are not, which may be added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import djinn_fx as djinn
from tests.runtime.checkpoint_cases import (
    PROMPT,
    assert_same,
    close_all,
    finish,
    run_of,
    shared,
    start,
    through_file,
)
from tests.runtime.tiny import direction


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    yield shared("gpt2")
    close_all(shared("gpt2"))


def test_built_in_predicates_and_counts_are_saved(dj: djinn.Dj, tmp_path: Path) -> None:
    points = [
        djinn.break_at("resid_post.0", djinn.when.probe(direction(2), 0.25), times=5),
        djinn.break_at("resid_post.1", djinn.when.cosine_above(direction(3), 0.1), positions="generated"),
        djinn.break_at("embed", djinn.when.token(PROMPT[10])),
        djinn.break_at("logits", djinn.when.entropy_below(3.5)),
        djinn.break_at("resid_post.*", times=4),
    ]
    run = start(dj.session(seed=5), points)
    again = run_of(dj.restore(through_file(next(run).checkpoint(), tmp_path)))
    later = finish(again)
    assert {site for site, _, _ in later.places} == {"embed", "resid_post.0", "resid_post.1", "logits"}
    assert_same(finish(run), later)


def test_a_users_function_stays_in_memory_and_out_of_files(dj: djinn.Dj, tmp_path: Path) -> None:
    own = djinn.break_at("resid_post.1", lambda h: h.sum() > -1e9)
    run = start(dj.session(seed=5), [own, "resid_post.0"])
    checkpoint = next(run).checkpoint()
    with pytest.warns(UserWarning, match=r"breakpoint at 'resid_post.1' is not saved"):
        path = checkpoint.save(tmp_path / "a.safetensors")
    expected = finish(run)
    assert_same(finish(run_of(dj.restore(checkpoint))), expected)
    assert_same(finish(run_of(dj.restore(path, breakpoints=[own]))), expected)
    close_all(dj)
    assert {site for site, _, _ in finish(run_of(dj.restore(path))).places} == {"resid_post.0"}


def test_breakpoints_need_a_run(dj: djinn.Dj) -> None:
    with dj.session() as session:
        checkpoint = session.checkpoint()
    with pytest.raises(djinn.InvalidValue, match="holds no run"):
        dj.restore(checkpoint, breakpoints=["embed"])
    assert not dj.engine.sessions


def test_callbacks_are_dropped(dj: djinn.Dj) -> None:
    heard: list[int] = []
    run = start(dj.session(), ["resid_post.1"], on_token=heard.append)
    again = run_of(dj.restore(next(run).checkpoint()))
    again.run_to_end()
    assert heard == [] and again.generated == 4
