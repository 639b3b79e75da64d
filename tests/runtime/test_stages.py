"""Stages: prompt chunks over shared static buffers keep their values apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.runtime.bits import same_bits
from djinn_fx.runtime.copies import copy_all
from djinn_fx.runtime.stages import Stage
from tests.bits import assert_same_bits
from tests.runtime.tiny import NEW, another_dj, direction, generated, guarded, prompt

ONE, OTHER = prompt(13, 1), prompt(11, 2)
SITES = ("resid_post.0", "attn_k.1", "resid_post.1")


@pytest.fixture(scope="module", params=["gpt2", "llama-bf16"])
def made(request: pytest.FixtureRequest) -> Iterator[djinn.Dj]:
    dj = another_dj(request.param, backend="static", sites=SITES)
    yield dj
    dj.close()


@pytest.fixture
def dj(made: djinn.Dj) -> Iterator[djinn.Dj]:
    yield from guarded(made)


def stages_of(dj: djinn.Dj) -> list[Stage]:
    stages = dj.engine.executor.stages
    assert stages is not None
    return list(stages._made.values())


def forwarded(dj: djinn.Dj, tokens: Tensor, scale: float = 1.0) -> torch.Tensor:
    with dj.session() as s:
        s.steer("resid_post.0", scale=scale)
        logits = s.forward(tokens).result().logits
    assert logits is not None
    return logits


def test_two_sessions_in_one_program_take_turns_at_every_site(dj: djinn.Dj) -> None:
    expected = [forwarded(dj, ONE), forwarded(dj, OTHER)]
    with dj.session() as a, dj.session() as b:
        runs = [a.forward(ONE, breakpoints=SITES), b.forward(OTHER, breakpoints=SITES)]
        seen: list[list[torch.Tensor]] = [[], []]
        stops = list(zip(*runs, strict=True))
        assert [first.site for first, _ in stops] == list(SITES)
        for pair in stops:
            for index, stop in enumerate(pair):
                seen[index].append(stop.value)
        for run, logits in zip(runs, expected, strict=True):
            assert_same_bits(run.result().logits, logits)
    for tokens, values in zip((ONE, OTHER), seen, strict=True):
        _, cache = dj.run_with_cache(tokens, list(SITES))
        for site, value in zip(SITES, values, strict=True):
            assert_same_bits(value, cache[site][0])
    assert len({id(stage) for stage in stages_of(dj)}) == len(stages_of(dj)) == 1


def test_an_edit_survives_another_session_on_the_stage(dj: djinn.Dj) -> None:
    expected = forwarded(dj, ONE, scale=0.5)
    with dj.session() as a, dj.session() as b:
        run = a.forward(ONE, breakpoints=["resid_post.0", "resid_post.1"])
        next(run).value.mul_(0.5)
        assert next(run).site == "resid_post.1"
        b.forward(OTHER).result()
        assert_same_bits(run.result().logits, expected)


def test_values_recorded_at_the_end_are_those_of_their_own_run(dj: djinn.Dj) -> None:
    _, cache = dj.run_with_cache(ONE, list(SITES))
    with dj.session() as a, dj.session() as b:
        run = a.generate(ONE, max_new_tokens=1, capture=SITES, breakpoints=["resid_post.1"])
        next(run)
        b.generate(OTHER, max_new_tokens=2).result()
        found = run.result().cache
    for site in SITES:
        assert_same_bits(found[site], cache[site][0])


def test_a_chunk_that_is_steered_at_a_stop_goes_on_in_the_richer_program(dj: djinn.Dj) -> None:
    with dj.session() as a:
        a.steer("resid_post.1", add=direction(3), positions="prompt")
        expected = a.forward(ONE).result().logits
    with dj.session() as a, dj.session() as b:
        run = a.forward(ONE, breakpoints=["resid_post.0"])
        next(run)
        a.steer("resid_post.1", add=direction(3))
        b.forward(OTHER).result()
        assert_same_bits(run.result().logits, expected)


def test_forks_of_a_stopped_prompt_go_on_alone(dj: djinn.Dj) -> None:
    plain, halved = forwarded(dj, ONE), forwarded(dj, ONE, scale=0.5)
    with dj.session() as a:
        run = a.forward(ONE, breakpoints=["resid_post.0"])
        forks = next(run).fork(2)
        forks[1].value.mul_(0.5)
        assert_same_bits(forks[1].run.result().logits, halved)
        assert_same_bits(run.result().logits, plain)
        assert_same_bits(forks[0].run.result().logits, plain)


def test_predicates_see_their_own_run_while_other_threads_go_on(dj: djinn.Dj) -> None:
    wanted = [generated(dj, tokens).tokens.tolist() for tokens in (ONE, OTHER)]
    norms: list[set[float]] = []
    for tokens in (ONE, OTHER):
        _, cache = dj.run_with_cache(tokens, "resid_post.1")
        norms.append({round(float(n), 3) for n in cache["resid_post.1"][0].float().norm(dim=-1)})
    failures: list[str] = []

    def work(index: int, tokens: Tensor) -> None:
        point = djinn.break_at("resid_post.1", when=djinn.when.norm_above(0.0), positions="prompt")
        for _ in range(4):
            with dj.session() as s:
                run = s.generate(tokens, max_new_tokens=NEW, breakpoints=[point])
                for stop in run:
                    found = {round(float(n), 3) for n in stop.value.float().norm(dim=-1)}
                    if not found <= norms[index] or len(stop.fired) != len(stop.positions):
                        failures.append(f"{index}: another run's values")
                if run.tokens.tolist() != wanted[index]:
                    failures.append(f"{index}: other tokens")

    threads = [threading.Thread(target=work, args=(i, tokens)) for i, tokens in enumerate((ONE, OTHER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_stages_of_sites_no_longer_compiled_go(dj: djinn.Dj) -> None:
    own = another_dj("gpt2", backend="static")
    with own.session() as s:
        s.forward(ONE).result()
        before = set(map(id, stages_of(own)))
        run = s.forward(OTHER, breakpoints=["resid_post.0"])
        next(run)
        own.add_sites("mlp_out.0")
        logits = run.result().logits
        assert before.isdisjoint(map(id, stages_of(own)))
    with own.session() as s:
        s.forward(ONE).result()
        assert_same_bits(s.forward(OTHER).result().logits, logits)
    own.close()


def test_a_stage_counts_every_buffer_once(dj: djinn.Dj) -> None:
    forwarded(dj, ONE, scale=0.5)
    for stage in stages_of(dj):
        own = [tensor for name, tensor in stage.env.items() if name not in stage.shared]
        apart = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in own}
        assert stage.nbytes == sum(apart.values()) >= sum(stage.env[site].nbytes for site in SITES)


def test_stages_stay_within_their_bound() -> None:
    own = another_dj("gpt2", backend="static")
    stages = own.engine.executor.stages
    assert stages is not None
    scales = (1.0, 0.5, 1.0, 0.75)
    expected = [forwarded(own, OTHER, scale) for scale in scales]
    assert own.memory()["buffers"] > stages.nbytes > 0
    stages.limit = max(stage.nbytes for stage in stages_of(own))
    with own.session() as a:
        run = a.generate(ONE, max_new_tokens=2, breakpoints=["resid_post.0"])
        next(run)  # it stands on a stage that goes
        for scale, logits in zip(scales, expected, strict=True):
            assert_same_bits(forwarded(own, OTHER, scale), logits)
            assert stages.nbytes <= stages.limit
        found = run.result().tokens
    assert found.tolist() == generated(own, ONE, 2).tokens.tolist()
    own.close()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_copies_keep_every_bit_of_a_nan(dtype: torch.dtype, device: str) -> None:
    """Through a wider type another NaN comes out than went in."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(device)
    whole = patterns.view(torch.float32) if dtype == torch.float32 else patterns.to(torch.int16).view(dtype)
    targets = [torch.empty_like(whole), torch.empty_like(whole[::2])]
    copy_all(targets, [whole, whole[::2]])
    assert same_bits(targets[0], whole) and same_bits(targets[1], whole[::2])


def test_a_nan_put_into_a_prompt_is_the_one_that_is_captured(
    made: djinn.Dj, dj: djinn.Dj, monkeypatch: pytest.MonkeyPatch
) -> None:
    def through_fp32(targets: list[Tensor], sources: list[Tensor]) -> None:
        """As CUDA copies many tensors: whatever NaN goes in, one comes out."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
            if target.dtype in (torch.bfloat16, torch.float16):
                target.view(torch.int16)[target.isnan()] = 0x7FFF

    monkeypatch.setattr(torch, "_foreach_copy_", through_fp32)
    with dj.session() as session:
        run = session.generate(ONE, max_new_tokens=2, breakpoints=["resid_post.1"], capture=["resid_post.1"])
        stop = next(run)
        stop.value.view(-1)[::19] = float("nan")
        wanted = stop.value.clone()
        assert_same_bits(run.result().cache["resid_post.1"][: len(ONE)], wanted)
