"""Checkpoints elsewhere: another process, another model, another environment, too little room."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.bundled import PATH, load
from djinn_fx.runtime.checkpoint import Checkpoint
from djinn_fx.runtime.stop import Stop
from tests.runtime.checkpoint_cases import (
    PROMPT,
    assert_same,
    close_all,
    edit,
    finish,
    run_of,
    shared,
    small_dj,
    start,
)
from tests.runtime.restore_child import outcome
from tests.runtime.tiny import direction, make_model, model_of, some

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dj() -> Iterator[djinn.Dj]:
    yield shared("gpt2")
    close_all(shared("gpt2"))


def stopped(dj: djinn.Dj, site: str = "resid_post.1", count: int = 4) -> Stop:
    run = start(dj.session(seed=5), [site])
    stops = [next(run) for _ in range(count)]
    return stops[-1]


def saved(stop: Stop, folder: Path) -> Checkpoint:
    return Checkpoint.load(stop.checkpoint().save(folder / "a.safetensors"))


# -- another process ---------------------------------------------------------------------------


def test_a_second_process_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    bundled = (PATH / "config.json").is_file()
    model: Any = load(str(PATH))[0] if bundled else make_model("gpt2")
    folder = PATH if bundled else tmp_path / "model"
    if not bundled:
        model.save_pretrained(folder)
    expected, files = [], []
    dj = small_dj(model, sites="resid_post")
    for count, steer in ((2, False), (4, True)):
        session = dj.session(seed=count)
        if steer:
            width = dj.sites.get("resid_post.0").width
            session.steer("resid_post.0", add=direction(1, width), strength=0.5)
        run = start(session, ["resid_post.1"])
        for _ in range(count):
            stop = next(run)
            edit(stop)
        files.append(str(stop.checkpoint().save(tmp_path / f"{count}.safetensors")))
        expected.append(outcome(run))
    command = [sys.executable, "-m", "tests.runtime.restore_child", str(folder), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    dj.close()


# -- another model -----------------------------------------------------------------------------


def changed(weights: Any) -> Any:
    """The weights with one bit of one tensor flipped."""
    name = next(iter(weights))
    copy = weights[name].detach().clone()
    copy.view(torch.int32).view(-1)[5] ^= 1
    return {**weights, name: copy}


@pytest.mark.parametrize("exact", [True, False])
def test_other_weights_are_refused(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exact: bool) -> None:
    stop = stopped(dj)
    in_memory, from_file = stop.checkpoint(), saved(stop, tmp_path)
    identity = dj.engine.identity
    monkeypatch.setattr(dj.engine, "identity", replace(identity, weights=changed(identity.weights)))
    before = dj.engine.arena.free_rows
    for checkpoint in (in_memory, from_file):
        with pytest.raises(djinn.CheckpointError, match=r"another model: weights: 1 of \d+ tensors differ, first 'tr"):
            dj.restore(checkpoint, exact=exact)
    assert dj.engine.arena.free_rows == before


def test_another_configuration_is_refused(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = saved(stopped(dj), tmp_path)
    identity = dj.engine.identity
    elsewhere = {**identity.config, "_name_or_path": "elsewhere", "transformers_version": "0"}
    monkeypatch.setattr(dj.engine, "identity", replace(identity, config=elsewhere))
    dj.restore(checkpoint).close()
    other = {**elsewhere, "activation_function": "relu"}
    monkeypatch.setattr(dj.engine, "identity", replace(identity, config=other))
    with pytest.raises(djinn.CheckpointError, match=r"config.activation_function: 'gelu_new' in the .*, 'relu' here"):
        dj.restore(checkpoint, exact=False)


def test_another_architecture_and_dtype_are_refused(dj: djinn.Dj, tmp_path: Path) -> None:
    with pytest.raises(djinn.CheckpointError, match="model_type: 'gpt2' in the checkpoint, 'llama' here") as caught:
        shared("llama-bf16").restore(saved(stopped(dj), tmp_path), exact=False)
    assert "dtype: 'float32' in the checkpoint, 'bfloat16' here" in str(caught.value)
    assert "exact=False does not help" in str(caught.value)


# -- another environment -----------------------------------------------------------------------


def test_another_environment_needs_consent(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop = stopped(dj, count=2)
    checkpoint = saved(stop, tmp_path)
    monkeypatch.setattr(dj.engine, "options", replace(dj.engine.options, prefill_chunk=4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(djinn.CheckpointError, match="pass exact=False to accept other bits") as caught:
        dj.restore(checkpoint)
    assert "prefill_chunk: 8 in the checkpoint, 4 here" in str(caught.value)
    assert "threads: 1 in the checkpoint, 77 here" in str(caught.value)
    again = run_of(dj.restore(checkpoint, exact=False))
    assert some(again.stop).site == stop.site
    places = [(site, position) for site, position, _ in finish(again).places]
    assert places == [("resid_post.1", position) for position in (18, 19, 20, 21)]


def test_other_sites_are_another_environment(dj: djinn.Dj, tmp_path: Path) -> None:
    other = small_dj(model_of("gpt2"), sites=("resid_post", "mlp_out.1"))
    checkpoint = saved(stopped(dj), tmp_path)
    with pytest.raises(djinn.CheckpointError, match=r"only compiled here: mlp_out\.1") as caught:
        other.restore(checkpoint)
    assert "sites not compiled here: embed, attn_z.0, attn_out.1, final_norm, ..." in str(caught.value)
    run_of(other.restore(checkpoint, exact=False)).result()
    other.close()


def test_more_rows_and_more_length_are_the_same_environment(dj: djinn.Dj, tmp_path: Path) -> None:
    roomy = small_dj(model_of("gpt2"), max_sessions=1, max_length=48)
    stop = stopped(dj)
    assert_same(finish(run_of(roomy.restore(saved(stop, tmp_path)))), finish(stop.run))
    roomy.close()


def test_weights_changed_in_place_give_other_bits(dj: djinn.Dj) -> None:
    stop = stopped(dj)
    checkpoint = stop.checkpoint()
    weight = dj.engine.identity.weights["transformer.h.0.mlp.c_fc.weight"]
    before, free = weight.detach().clone(), dj.engine.arena.free_rows
    try:
        weight.detach().mul_(1.01)
        with pytest.raises(djinn.CheckpointError, match=r"other bits here at 'resid_post.1'.*changed in place"):
            dj.restore(checkpoint)
        assert dj.engine.arena.free_rows == free
        dj.restore(checkpoint, exact=False).close()
    finally:
        weight.detach().copy_(before)
    assert_same(finish(run_of(dj.restore(checkpoint))), finish(stop.run))


# -- too little room ---------------------------------------------------------------------------


def test_a_site_that_is_not_compiled(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stopped(dj, "attn_z.0").checkpoint()
    less = tuple(site for site in dj.engine.sites if site.name != "attn_z.0")
    monkeypatch.setattr(dj.engine, "sites", less)
    with pytest.raises(djinn.SiteNotCompiled, match=r"dj.add_sites\('attn_z.0'\)"):
        dj.restore(checkpoint, exact=False)


def test_an_edit_at_a_site_that_is_not_compiled(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    with dj.session() as session:
        session.steer("attn_out.1", scale=0.5)
        checkpoint = session.checkpoint()
    less = tuple(site for site in dj.engine.sites if site.name != "attn_out.1")
    monkeypatch.setattr(dj.engine, "sites", less)
    with pytest.raises(djinn.SiteNotCompiled, match=r"attn_out\.1"):
        dj.restore(checkpoint, exact=False)


def test_a_session_that_is_too_long(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stopped(dj).checkpoint()
    monkeypatch.setattr(dj.engine, "options", replace(dj.engine.options, max_length=len(PROMPT) - 1))
    with pytest.raises(djinn.CapacityError, match=r"19 positions, .* max_length=18. Compile with max_length=19"):
        dj.restore(checkpoint)


def test_an_edit_of_too_many_directions(dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch) -> None:
    with dj.session() as session:
        session.steer("attn_out.1", ablate=direction(2, 2, 32))
        checkpoint = session.checkpoint()
    monkeypatch.setattr(dj.engine, "options", replace(dj.engine.options, edit_rank=1))
    with pytest.raises(djinn.CapacityError, match="edit_rank=2 or more"):
        dj.restore(checkpoint, exact=False)


def test_no_free_row(dj: djinn.Dj) -> None:
    checkpoint = stopped(dj).checkpoint()
    while dj.engine.arena.free_rows:
        dj.session()
    for session in dj.engine.sessions:
        session.pin()
    sessions = list(dj.engine.sessions)
    with pytest.raises(djinn.CapacityError, match="0 of 4 free"):
        dj.restore(checkpoint)
    assert dj.engine.sessions == sessions
    sessions[0].close()
    assert run_of(dj.restore(checkpoint)).stop is not None
