"""Layers that stream: nobody sees it but in ``dj.memory()``. Every act is the same, bit for bit, on any budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.errors import CaptureError, InvalidValue
from tests.backends import least
from tests.bits import assert_same_bits
from tests.runtime.streams import BACKENDS, LAYERS, PROMPT, after, compiled, feed_of, make, model_of, weights_of, whole
from tests.runtime.tiny import some

Pair = tuple[djinn.Dj, djinn.Dj]


@pytest.fixture(params=[(name, backend) for name in ("gpt2", "llama") for backend in BACKENDS], ids="-".join)
def pair(request: pytest.FixtureRequest) -> Pair:
    """A model that streams all its layers, and the same as it always was."""
    name, backend = request.param
    return compiled(name, backend, True), compiled(name, backend, False)


def test_a_stop_at_every_site_changes_nothing(pair: Pair) -> None:
    streaming, usual = pair
    assert_same_bits(whole(streaming), whole(usual))
    values = []
    for dj in pair:
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=5, output_logits=True, breakpoints=dj.compiled_sites)
            values.append([(stop.site, stop.position, stop.value.clone()) for stop in run])
            assert_same_bits(run.result().logits, whole(usual))
    assert len(values[0]) == len(streaming.compiled_sites) * (2 + 4)
    for one, other in zip(*values, strict=True):
        assert one[:2] == other[:2]
        assert_same_bits(one[2], other[2], str(one[:2]))


def test_edits_steering_and_predicates(pair: Pair) -> None:
    found = []
    for dj in pair:
        with dj.session() as s:
            s.steer("resid_post.1", add=torch.linspace(-1, 1, 32))
            run = s.generate(
                PROMPT,
                max_new_tokens=5,
                output_logits=True,
                breakpoints=[djinn.break_at("resid_post.3", djinn.when.norm_above(1.0), positions="generated")],
            )
            stops = 0
            for stop in run:
                stop.value.mul_(-0.5)
                stops += 1
            assert stops
            found.append(run.result().logits)
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[0], whole(pair[0]))  # type: ignore[arg-type]


def test_forks_from_the_middle_of_a_prompt_and_of_a_step(pair: Pair) -> None:
    found: list[list[Tensor]] = []
    for dj in pair:
        here: list[Tensor] = []
        for site in ("attn_q.1", "resid_post.3"):
            with dj.session() as s:
                run = s.generate(PROMPT, max_new_tokens=3, output_logits=True, breakpoints=[site])
                for skip in range(3):
                    stop = some(after(run))
                    assert stop.current, skip
                twins = stop.fork(2)
                twins[0].value.mul_(0.3)
                runs = [run, *(twin.run for twin in twins)]
                for each in runs:
                    result = each.result().logits
                    assert result is not None
                    here.append(result)
                for twin in twins:
                    twin.session.close()
        found.append(here)
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


def test_sessions_that_stop_in_turns_take_one_another_the_slots(pair: Pair) -> None:
    """Each stands in the middle of its prompt at another layer, so the slots hold what the other one needs last."""
    streaming, usual = pair
    sessions = [streaming.session() for _ in range(3)]
    runs = [
        s.generate(PROMPT[index:], max_new_tokens=4, output_logits=True, breakpoints=["resid_post"])
        for index, s in enumerate(sessions)
    ]
    for _ in range(LAYERS * 5):
        for run in runs:
            after(run)
    streaming([5, 6, 7])
    for index, (session, run) in enumerate(zip(sessions, runs, strict=True)):
        with usual.session() as s:
            expected = s.generate(PROMPT[index:], max_new_tokens=4, output_logits=True).result()
        assert_same_bits(run.result().logits, expected.logits)
        session.close()


def test_a_batch_and_whole_prompts(pair: Pair) -> None:
    prompts = [PROMPT, PROMPT[:3], PROMPT[4:], [9], PROMPT[5:11]]
    results = [dj.generate(prompts, max_new_tokens=4, output_logits=True) for dj in pair]
    for one, other in zip(*results, strict=True):
        assert_same_bits(one.logits, other.logits)
    caches = [dj.run_with_cache(PROMPT, "*.2") for dj in pair]
    assert_same_bits(caches[0][0], caches[1][0])
    for site in caches[1][1]:
        assert_same_bits(caches[0][1][site], caches[1][1][site], site)
    hidden = caches[0][1]["resid_post.2"]
    assert_same_bits(pair[0].unembed(hidden), pair[1].unembed(hidden))


def test_rewind_and_checkpoints_across_budgets(pair: Pair, tmp_path: Path) -> None:
    """What was saved with streaming layers goes on without them, and the other way round."""
    expected = whole(pair[1])
    for first, second in (pair, pair[::-1]):
        with first.session() as s:
            run = s.generate(PROMPT, max_new_tokens=5, output_logits=True, breakpoints=["resid_post.2"])
            stops = [after(run) for _ in range(4)]
            assert stops[-1] is not None
            run.rewind(len(PROMPT))
            s.checkpoint().save(tmp_path / "it")
        with second.restore(tmp_path / "it") as again:
            assert again.run is not None
            assert_same_bits(again.run.result().logits, expected)


def test_changes_in_place_are_seen_at_the_next_segment() -> None:
    for backend in BACKENDS:
        model = model_of("gpt2")
        streaming, usual = compiled("gpt2", backend, True), compiled("gpt2", backend, False)
        before = whole(streaming)
        matrix, norm = model.transformer.h[3].mlp.c_fc.weight, model.transformer.h[3].ln_1.weight
        kept = matrix.detach().clone(), norm.detach().clone()
        try:
            with torch.no_grad():
                matrix.mul_(1.5)
                norm.mul_(0.5)
            assert_same_bits(whole(streaming), whole(usual))
            assert not torch.equal(whole(streaming), before)
            matrix.data.copy_(kept[0])  # leaves no trace
            norm.data.copy_(kept[1])
            streaming.reload_weights()
            assert_same_bits(whole(streaming), before)
            found = []
            for dj in (streaming, usual):  # in the middle of a prompt
                with dj.session() as s:
                    run = s.forward(PROMPT, breakpoints=["resid_post.1"])
                    assert after(run) is not None
                    with torch.no_grad():
                        matrix.mul_(2)
                    found.append(run.result().logits)
                    with torch.no_grad():
                        matrix.copy_(kept[0])
            assert_same_bits(found[0], found[1])
        finally:
            with torch.no_grad():
                matrix.copy_(kept[0])
                norm.copy_(kept[1])
        assert_same_bits(whole(streaming), before)


def test_a_parameter_that_is_replaced_is_refused() -> None:
    model = model_of("gpt2")
    dj = compiled("gpt2", "eager", True)
    norm = model.transformer.h[0].ln_1
    kept = norm.weight
    norm.weight = torch.nn.Parameter(kept.detach().clone())
    try:
        with pytest.raises(CaptureError, match="moved or replaced"):
            whole(dj)
    finally:
        norm.weight = kept
    whole(dj)


def test_budgets_between_and_what_memory_says() -> None:
    model, _ = storyteller()
    usual = make(model, "static", None)
    expected, lowest = whole(usual), least(model)
    assert usual.memory()["weights_streamed"] == 0
    for budget in (lowest, (lowest + usual.memory()["weights"]) // 2, 1 << 40):
        dj = make(model, "static", budget)
        assert_same_bits(whole(dj), expected)
        memory, placement = dj.memory(), weights_of(dj).placement
        assert memory["weights"] == placement.device_bytes <= budget
        assert memory["weights_streamed"] == placement.streamed_bytes
        assert bool(placement.streamed) == (budget < 1 << 40)


def test_the_receipt_is_made_with_layers_that_stream() -> None:
    model = model_of("llama")
    dj = make(model, "eager", least(model), verify=True)
    assert dj.receipt is not None and dj.receipt.exact


def test_few_sites_do_not_make_a_segment_of_many_layers() -> None:
    model = model_of("gpt2")
    usual = make(model, "eager", None, sites="resid_post.3")
    streaming = make(model, "eager", least(model), sites="resid_post.3")
    layers = [use.layers for use in feed_of(streaming.program).uses]
    assert max(map(len, layers)) == 1 and {rank for some in layers for rank in some} == set(range(LAYERS))
    for dj in (
        usual,
        streaming,
    ):  # a chunk that goes on in a richer program, in the middle of a segment of the usual one
        dj.add_sites("mlp_out.1")
    found = []
    for dj in (usual, streaming):
        with dj.session() as s:
            run = s.forward(PROMPT, breakpoints=["mlp_out.1"])
            stop = after(run)
            assert stop is not None
            s.steer("resid_post.3", scale=0.5)
            found.append(run.result().logits)
    assert_same_bits(found[0], found[1])


def test_the_default_sites_are_cut_as_ever() -> None:
    model = model_of("gpt2")
    names = [
        [segment.outputs for segment in make(model, "eager", budget).program.segments]
        for budget in (None, least(model))
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_bytes": -1}, "give a number of bytes"),
        ({"device": "nowhere"}, "give 'cuda'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        djinn.compile(model_of("gpt2"), **options)


def test_plain_modules_do_not_stream() -> None:
    with pytest.raises(InvalidValue, match="for language models"):
        djinn.compile(torch.nn.Linear(2, 2), example_inputs=(torch.ones(2),), weights_bytes=1)  # type: ignore[call-overload]
