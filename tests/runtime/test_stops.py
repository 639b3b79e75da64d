"""Stops: untouched they change nothing, wherever they are; touched in any way they change what follows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import djinn_fx as djinn
from djinn_fx.runtime.results import Result
from djinn_fx.runtime.stop import Stop
from tests.bits import assert_same_bits, same_bits
from tests.runtime.tiny import (
    CHUNK,
    NEW,
    PROMPT,
    assert_same,
    bits_of,
    direction,
    generated,
    logits_of,
    prompt,
    some,
    values,
)


def test_stopping_everywhere_at_once_changes_nothing(every: djinn.Dj) -> None:
    ids, names = prompt(PROMPT), every.compiled_sites
    plain = generated(every, ids, NEW)
    with every.session() as s:
        run = s.generate(ids, max_new_tokens=NEW, output_logits=True, breakpoints=names)
        places = [(stop.position, stop.site) for stop in run]
        assert_same(run.result(), plain)
    steps = [CHUNK - 1, PROMPT - 1, *range(PROMPT, PROMPT + NEW - 1)]
    assert places == [(position, name) for position in steps for name in names]


def test_stopping_at_each_site_alone_changes_nothing(every: djinn.Dj) -> None:
    ids = prompt(PROMPT)
    plain = generated(every, ids, 3)
    with every.session() as s:
        whole = logits_of(s, ids)
    for name in every.compiled_sites:
        with every.session() as s:
            run = s.generate(ids, max_new_tokens=3, output_logits=True, breakpoints=[name])
            assert [stop.site for stop in run] == [name] * 4
            assert_same(run.result(), plain, name)
        with every.session() as s:
            run = s.forward(ids, breakpoints=[name])
            assert [stop.position for stop in run] == [CHUNK - 1, PROMPT - 1]
            assert_same_bits(run.result().logits, whole, name)


def test_values_are_those_of_run_with_cache(every: djinn.Dj) -> None:
    ids = prompt(PROMPT)
    logits, cache = every.run_with_cache(ids, every.compiled_sites)
    with every.session() as s:
        run = s.forward(ids, breakpoints=every.compiled_sites, capture=every.compiled_sites)
        seen = values(run)
        result = run.result()
    assert logits is not None
    assert_same_bits(result.logits, logits[0])
    for name in every.compiled_sites:
        stopped = torch.cat([seen[CHUNK - 1, name], seen[PROMPT - 1, name]])
        assert_same_bits(stopped, cache[name][0], name)
        assert_same_bits(stopped, result.cache[name], name)


def test_generated_values_are_those_of_capture(every: djinn.Dj) -> None:
    ids, names = prompt(4), every.compiled_sites
    with every.session() as s:
        run = s.generate(ids, max_new_tokens=4, breakpoints=names, capture=names)
        seen = values(run)
        cache = run.result().cache
    for name in names:
        stopped = torch.cat([seen[position, name] for position in range(3, 7)])
        assert_same_bits(stopped, cache[name], name)


# -- edits ---------------------------------------------------------------------------------------


def in_place(stop: Stop) -> None:
    stop.value.mul_(-0.5)


def assign(stop: Stop) -> None:
    stop.value = stop.value * -0.5


def assign_a_view(stop: Stop) -> None:
    wide = torch.stack([stop.value * -0.5, stop.value], dim=-1)
    stop.value = wide[..., 0]


def through_data(stop: Stop) -> None:
    stop.value.data.mul_(-0.5)


def new_data(stop: Stop) -> None:
    stop.value.data = stop.value * -0.5


def through_numpy(stop: Stop) -> None:
    stop.value.numpy()[:] *= -0.5


def through_an_alias(stop: Stop) -> None:
    rows = list(stop.value)
    for row in rows:
        row.flatten()[:] *= -0.5


FORMS = [in_place, assign, assign_a_view, through_data, new_data, through_numpy, through_an_alias]


def test_every_way_to_edit_is_what_a_hook_does(dj: djinn.Dj) -> None:
    ids = prompt(12)
    hooked = dj.run_with_hooks(ids, [("resid_post.0", lambda value: value * -0.5)])
    assert hooked is not None
    for form in FORMS if dj.engine.dtype == torch.float32 else FORMS[:-2]:
        with dj.session() as s:
            run = s.forward(ids, breakpoints=["resid_post.0"])
            for stop in run:
                form(stop)
            assert_same_bits(run.result().logits, hooked[0], form.__name__)


def test_every_way_to_edit_acts_on_generated_tokens(dj: djinn.Dj) -> None:
    def edited(form: Callable[[Stop], None]) -> Result:
        with dj.session() as s:
            run = s.generate(prompt(9), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
            for stop in run:
                if stop.phase == "generated":
                    form(stop)
            return run.result()

    expected = edited(in_place)
    assert not same_bits(bits_of(expected), bits_of(generated(dj, prompt(9), NEW)))
    for form in FORMS[1:] if dj.engine.dtype == torch.float32 else FORMS[1:-2]:
        assert_same(edited(form), expected, form.__name__)


def one_more_at_2(value: torch.Tensor) -> None:
    value[:, 2] += 1


def untouched(value: torch.Tensor) -> None:
    """Its cut makes the program that the session runs too."""


def test_an_edit_at_each_site_is_a_hook_at_each_site(every: djinn.Dj) -> None:
    ids = prompt(6)
    for name in every.compiled_sites:
        with every.session() as s:
            run = s.forward(ids, breakpoints=[djinn.break_at(name, positions=2)])
            for stop in run:
                stop.value[2] += 1
            hooks = [(site, one_more_at_2 if site == name else untouched) for site in every.compiled_sites]
            hooked = every.run_with_hooks(ids, hooks)
            assert hooked is not None
            assert_same_bits(run.result().logits, hooked[0], name)


def test_an_equal_value_is_no_edit(dj: djinn.Dj) -> None:
    plain = generated(dj, prompt(PROMPT), NEW)
    with dj.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.0"])
        for stop in run:
            stop.value = stop.value.clone()
            stop.value.mul_(-2).mul_(-0.5)
        assert_same(run.result(), plain)
        assert not any(step.injections for step in s.journal)


def test_edits_at_two_sites_of_one_step_both_hold(dj: djinn.Dj) -> None:
    add, sites = direction(1).to(dj.engine.dtype), ("resid_post.0", "resid_post.1")
    with dj.session() as s:
        run = s.forward(prompt(12), breakpoints=sites)
        for stop in run:
            stop.value.add_(add)
        hooked = dj.run_with_hooks(prompt(12), [(site, lambda value: value + add) for site in sites])
        assert hooked is not None
        assert_same_bits(run.result().logits, hooked[0])


def test_the_logits_are_a_site_that_decides_the_token(both: djinn.Dj) -> None:
    with both.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=4, output_logits=True, breakpoints=["logits"])
        for stop in run:
            assert stop.value.shape == (1, 64) and stop.positions == (stop.position,)
            stop.value[0, 40 + stop.position % 3] = 100.0
        result = run.result()
    assert result.tokens[PROMPT:].tolist() == [41, 42, 40, 41]
    assert result.logits is not None and bool((result.logits.amax(-1) == 100.0).all())


# -- what a stop says ----------------------------------------------------------------------------


def test_a_stop_says_where_it_is(one: djinn.Dj) -> None:
    ids = prompt(PROMPT)
    with one.session() as s:
        run = s.generate(ids, max_new_tokens=2, breakpoints=["blocks.1.hook_resid_post"])
        assert run.stop is None and iter(run) is run
        first, second, third = next(run), next(run), next(run)
        assert (first.positions, first.position, first.phase) == (tuple(range(16)), 15, "prompt")
        assert (second.positions, second.position) == ((16, 17, 18, 19), 19)
        assert (third.positions, third.position, third.phase) == ((20,), 20, "generated")
        assert third.fired == (20,) and first.fired == first.positions
        assert [stop.value.shape for stop in (first, second, third)] == [(16, 32), (4, 32), (1, 32)]
        assert second.tokens.tolist() == ids.tolist() and third.tokens.tolist() == s.tokens.tolist()
        for stop in (first, second, third):
            assert (stop.site, stop.layer, stop.run, stop.session) == ("resid_post.1", 1, run, s)
        assert run.stop is third and "resid_post.1" in repr(third) and "stale" in repr(first)
        assert next(run, None) is None and run.stop is None and run.finish_reason == "length"


def test_a_stale_stop_can_be_read_but_not_used(one: djinn.Dj) -> None:
    plain = generated(one, prompt(9), 3)
    with one.session() as s:
        run = s.generate(prompt(9), max_new_tokens=3, output_logits=True, breakpoints=["resid_post.0"])
        stale = next(run)
        kept = stale.value.clone()
        next(run)
        acts: list[Callable[[], object]] = [
            stale.step,
            stale.fork,
            stale.checkpoint,
            stale.hold,
            stale.release,
            lambda: assign(stale),
        ]
        for act in acts:
            with pytest.raises(djinn.StaleStop, match=r"went on from this stop at 'resid_post.0', position 8"):
                act()
        assert_same_bits(stale.value, kept)
        stale.value.zero_()
        assert_same(run.result(), plain)
        with pytest.raises(djinn.StaleStop, match=r"position 8\. Use run\.rewind\("):  # it stands nowhere any more
            stale.step()


# -- going on ------------------------------------------------------------------------------------


def test_step_goes_to_the_next_site_and_over_the_edge_of_the_step(both: djinn.Dj) -> None:
    names = both.compiled_sites
    plain = generated(both, prompt(PROMPT), 3)
    with both.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=3, output_logits=True, breakpoints=["resid_post.0"])
        stop: Stop | None = next(run)
        seen = [(some(stop).position, some(stop).site)]
        while stop is not None:
            stop = stop.step()
            seen += [(stop.position, stop.site)] if stop is not None else []
            assert run.stop is stop
        steps = [CHUNK - 1, PROMPT - 1, PROMPT, PROMPT + 1]
        assert seen == [(p, n) for p in steps for n in names][names.index("resid_post.0") :]
        assert_same(run.result(), plain)


def test_step_by_tokens_keeps_the_site_and_passes_over_breakpoints(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=6, breakpoints=["resid_post.0", "resid_post.1"])
        stop = next(run)
        places = [(stop := some(stop.step(tokens=n))).position for n in (1, 1, 2)]
        assert places == [PROMPT - 1, PROMPT, PROMPT + 2] and stop.site == "resid_post.0" and stop.fired == ()
        assert [(stop.position, stop.site) for stop in run][:2] == [(22, "resid_post.1"), (23, "resid_post.0")]
        assert some(s.forward(prompt(3), breakpoints=["mlp_out.1"]).__next__()).step(tokens=1) is None


def test_stepping_inside_the_loop_moves_the_loop(one: djinn.Dj) -> None:
    with one.session() as s:
        run = s.generate(prompt(4), max_new_tokens=8, breakpoints=["resid_post.0"])
        seen = []
        for stop in run:
            seen.append(stop.position)
            stop.step(tokens=2)
        assert seen == [3, 6, 9]


def test_leaving_the_loop_leaves_the_run_stopped(one: djinn.Dj) -> None:
    plain = generated(one, prompt(PROMPT), NEW)
    with one.session() as s:
        run = s.generate(prompt(PROMPT), max_new_tokens=NEW, output_logits=True, breakpoints=["resid_post.1"])
        for stop in run:
            if stop.position == CHUNK - 1:
                break
        assert run.stop is stop and not run.finished and s.tokens.tolist() == prompt(PROMPT).tolist()
        with pytest.raises(ZeroDivisionError):
            for stop in run:
                if stop.phase == "generated":
                    raise ZeroDivisionError
        assert run.stop is stop and stop.position == PROMPT
        assert [stop.position for stop in run] == [PROMPT + 1, PROMPT + 2]
        assert_same(run.result(), plain)
