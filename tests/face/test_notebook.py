"""Views in a notebook: what they say, that they say it of anything, and that looking changes nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from IPython.core.formatters import HTMLFormatter

import djinn_fx as djinn
from djinn_fx.bundled import storyteller
from djinn_fx.notebook import page, render, sparkline
from djinn_fx.runtime.receipt import Check, Receipt
from djinn_fx.views import Curve, Share, Table, Text, View
from tests.bits import assert_same_bits

PROMPT = "It was a grey morning, and Mara felt sad."
LIMIT = 30_000


@pytest.fixture(scope="module")
def dj() -> djinn.Dj:
    torch.set_num_threads(1)
    model, tokenizer = storyteller()
    return djinn.compile(model, tokenizer=tokenizer, max_length=128)


def shown(thing: Any) -> str:
    """The HTML that IPython would show of a thing: well formed and small."""
    text = HTMLFormatter()(thing)
    assert isinstance(text, str) and len(text.encode()) < LIMIT
    assert "not shown" not in text, text
    assert "<script" not in text and "://" not in text
    for tag in ("div", "table", "tr", "td", "th", "svg", "span"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    return text


# -- stops and runs ----------------------------------------------------------------------------


def test_a_stop_says_where_why_and_what_the_model_would_say(dj: djinn.Dj) -> None:
    with dj.session() as s:
        s.steer("resid_post.0", scale=0.9, positions="generated")
        limit = djinn.when.norm_above(20.0)
        run = s.generate(PROMPT, max_new_tokens=4, breakpoints=[djinn.break_at("resid_post.2", when=limit)])
        stop = next(run)
        text = shown(stop)
        assert "Stop after resid_post.2" in text and "positions 0 to 10, prompt" in text
        assert "break_at(&#x27;resid_post.2&#x27;, when=NormAbove(limit=20.0))" in text
        assert "resid_post.0: scale=0.9, positions=&#x27;generated&#x27;" in text
        assert "(11, 128) float32 on cpu" in text and "stale" not in text
        assert text.count("<circle") == len(stop.fired) == int((stop.value.norm(dim=1) > 20).sum()) > 0
        best = dj.unembed(stop.value[-1]).softmax(-1).max(-1)
        assert f"{s.engine.decode_text([int(best.indices)])}&#x27; {float(best.values):.0%}" in text
        drawn = re.search(r'<polyline points="([^"]+)"', text)
        assert drawn is not None and len(drawn[1].split()) == 11
        next(run, None)
        assert "stale" in shown(stop)
    assert "closed session" in shown(stop)


def test_a_stop_while_decoding_and_one_that_was_written_to(dj: djinn.Dj) -> None:
    with dj.session() as s:
        run = s.generate(PROMPT, max_new_tokens=4, breakpoints=[djinn.break_at("resid_post.1", positions="generated")])
        stop = next(run)
        assert "position 11, generated" in shown(stop)
        stop.value[0, 3] = math.nan
        text = shown(stop)
        assert "written to" in text and "1 NaN" in text and "no logit lens" in text
        fork = stop.fork()[0]
        assert "Stop after resid_post.1" in shown(fork)


def test_a_stale_stop_keeps_its_own_tokens_when_the_run_goes_another_way(dj: djinn.Dj) -> None:
    with dj.session() as s:
        run = s.generate(PROMPT, max_new_tokens=8, breakpoints=[djinn.break_at("resid_post.1", positions=14)])
        stop = next(run)
        before = re.findall(r"<td[^>]*>([^<]*)</td>", shown(stop))
        run.rewind(position=5)
        after = re.findall(r"<td[^>]*>([^<]*)</td>", shown(stop))
        assert before[-3:] == after[-3:]


def test_other_sites_have_norms_and_no_lens_and_logits_are_their_own(dj: djinn.Dj) -> None:
    model, tokenizer = storyteller()
    with (
        djinn.compile(model, tokenizer=tokenizer, max_length=32, verify=False, sites=["attn_q.1", "logits"]) as other,
        other.session() as s,
    ):
        run = s.generate("The sky was", max_new_tokens=2, breakpoints=["attn_q.1", "logits"])
        heads, logits = next(run), next(run)
        assert "the logit lens is shown at residual sites" in shown(heads) and "(3, 4, 32)" in shown(heads)
        assert "likeliest next" in shown(logits)
    plain = djinn.compile(model, max_length=32, verify=False)
    with plain.session() as s:  # without a tokenizer: numbers
        assert "<td" in shown(next(s.generate([5, 6, 7], max_new_tokens=2, breakpoints=["resid_post.1"])))
        assert "5, 6, 7" in shown(s.run)


def test_a_run_says_its_state_its_text_and_where_it_may_stop(dj: djinn.Dj) -> None:
    with dj.session() as s:
        point = djinn.break_at("resid_post.2", times=2)
        run = s.generate(PROMPT, max_new_tokens=6, breakpoints=[point, "resid_post.3"])
        assert "paused" in shown(run) and "(2 left)" in shown(run) and "no stop" in shown(run)
        next(run)
        assert "stopped" in shown(run) and "(1 left)" in shown(run) and "resid_post.2, positions 0 to 10" in shown(run)
        assert "generate, stopped" in shown(s)
        result = run.result()
        assert "finished: length" in shown(run) and "6 generated of at most 6" in shown(run)
        assert result.text is not None and result.text in shown(run).replace("&#x27;", "'")
        assert result.text in shown(result).replace("&#x27;", "'")
        assert "KV on the device" in shown(s)
    assert "closed" in shown(run) and "closed" in shown(s)


def test_looking_changes_nothing(dj: djinn.Dj) -> None:
    def told(look: bool) -> djinn.Result:
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=8, breakpoints=["resid_post.1"], output_logits=True)
            for stop in run:
                if look:
                    before = stop.value.clone()
                    shown(stop), shown(run), shown(s)
                    assert_same_bits(stop.value, before)
                    assert not stop.written and stop.current
            return run.result()

    assert_same_bits(told(look=True).logits, told(look=False).logits)


# -- caches, receipts and the rest --------------------------------------------------------------


def test_a_cache_says_shapes_bytes_and_norms_without_the_pads(dj: djinn.Dj) -> None:
    cache = dj.run_with_cache([PROMPT, "Anna walked"], ["resid_post.1", "attn_q.0"], logits=False)[1]
    text = shown(cache)
    assert "2 sites" in text and "(2, 11, 128) float32 on cpu" in text and "(2, 11, 4, 32)" in text
    norms = cache["resid_post.1"].norm(dim=2)
    mean = (norms.sum(0) / (norms != 0).sum(0)).mean()
    assert f">{mean:.2f}<" in text
    everything = dj.run_with_cache([PROMPT] * 3, "*", logits=False)[1]
    assert f"and {len(everything) - 24} more sites" in shown(everything)
    cache["resid_post.1"][0, 2, 3] = math.inf
    assert "1 not finite" in shown(cache)
    with dj.session() as s:
        result = s.generate(PROMPT, max_new_tokens=2, capture=["resid_post.1"]).result()
    assert "(12, 128)" in shown(result) and "(12, 128)" in shown(result.cache)


def test_a_receipt_says_every_comparison(dj: djinn.Dj) -> None:
    assert dj.receipt is not None
    text = shown(dj.receipt)
    for check in dj.receipt.checks:
        assert f">{check.name}</td>" in text and f">{check.verdict}</td>" in text
    assert "nothing differs" in text
    bad = Receipt(8, (Check("a < b", "differs", 1.0), Check("c", "bitwise")), pending=("d",), nonfinite=True)
    text = shown(bad)
    assert "SOMETHING DIFFERS" in text and "a &lt; b" in text and "compared when first needed: d" in text
    assert text.count("font-weight:bold") == 4  # the cells of that row alone


def test_a_diff_and_memory(dj: djinn.Dj) -> None:
    with dj.session() as s:
        stop = next(s.generate(PROMPT, max_new_tokens=60, breakpoints=["resid_post.1"]))
        fork = stop.fork()[0]
        fork.value.mul_(-1.0)
        dj.results([stop.run, fork.run])
        found = djinn.diff(stop.run, fork.run, dj=dj)
        text = shown(found)
        assert f"tokens part at position {found.first_difference}" in text
        assert "more positions" in text and text.count("<tr") < 45
        memory = shown(dj.memory())
        assert ">kv</td>" in memory and "session 1" in memory


def test_a_plain_modules_stops_and_caches() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    compiled = djinn.compile(module, example_inputs=(torch.zeros(2, 5, 3),))
    stops = list(compiled.run(torch.ones(2, 5, 3), breakpoints=["0"]))
    assert "Stop after 0" in shown(stops[0]) and "stale" in shown(stops[0])
    _, cache = compiled.run_with_cache(torch.ones(2, 5, 3))
    assert "(2, 5, 4)" in shown(cache) and f">{cache['0'].norm():.2f}<" in shown(cache)


# -- the renderer ------------------------------------------------------------------------------


def test_everything_is_escaped() -> None:
    bad = "</td><script>alert('x')</script>&"
    cells = (bad, Share(bad, 0.5), Curve((1.0, 2.0), bad, bad))
    table = Table(bad, (bad,) * 3, (True,) * 3, (cells,), bad)
    view = View(bad, bad, ((bad, bad),), ((bad, Text(((bad, True),))), (bad, Curve((1.0, 2.0), bad, bad)), table))
    assert "<script" not in page(view) and page(view).count("&lt;script") >= 13


def test_a_text_cannot_turn_its_direction() -> None:
    text = page(View("a\u202eb\x1b[31m", "two\nlines\tof it", (), ()))
    assert "a\\u202eb\\x1b[31m" in text and "two\nlines\tof it" in text


def test_it_never_raises_and_says_why() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError("not even this")

    def fails() -> View:
        raise RuntimeError("a <b>device</b> is gone")

    text = render(fails, lambda: repr(Broken()))
    assert "RuntimeError: a &lt;b&gt;device&lt;/b&gt; is gone" in text and "ValueError" in text


@pytest.mark.parametrize(
    "values",
    [
        (),
        (1.0,),
        (2.0, 2.0),
        (math.nan,),
        (math.nan, 1.0, math.inf, 2.0, 3.0),
        (-1e30, 1e30),
        tuple(map(float, range(200))),
    ],
    ids=str,
)
def test_a_curve_of_any_values_is_sound(values: tuple[float, ...]) -> None:
    text = sparkline(Curve(values, marks=(0,) if values else ()))
    bad = sum(not math.isfinite(value) for value in values)
    assert text.count("<line ") == bad
    numbers = [float(n) for pair in re.findall(r'points="([^"]*)"', text) for n in re.split(r"[ ,]", pair)]
    assert all(math.isfinite(number) and 0 <= number <= 420 for number in numbers)
    assert len(numbers) >= 2 * (len(values) - bad)


# -- in a browser ------------------------------------------------------------------------------


@pytest.mark.parametrize("ink", ["rgb(17, 17, 17)", "rgb(221, 221, 221)"])
def test_it_takes_its_colours_from_the_notebook(dj: djinn.Dj, browser: Any, tmp_path: Path, ink: str) -> None:
    with dj.session() as s:
        stop = next(
            s.generate(PROMPT, max_new_tokens=4, breakpoints=[djinn.break_at("resid_post.2", positions=(3, 4))])
        )
        html = f"<!doctype html><body style='color:{ink}'>{shown(stop)}</body>"
    (tmp_path / "view.html").write_text(html, encoding="utf-8")
    view = browser.new_page(viewport={"width": 900, "height": 600})
    wrong: list[str] = []
    view.on("console", lambda message: wrong.append(message.text))
    view.goto((tmp_path / "view.html").as_uri())
    assert {each.evaluate("e => getComputedStyle(e).color") for each in view.locator("td, th, b").all()} == {ink}
    assert view.locator("polyline").first.evaluate("e => getComputedStyle(e).stroke") == ink
    assert view.locator("circle").count() == 2
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wrong == []
    view.close()


@pytest.mark.gpu
def test_on_a_gpu_looking_changes_nothing() -> None:
    model, tokenizer = storyteller()
    dj = djinn.compile(model.cuda(), tokenizer=tokenizer, max_length=128)

    def told(look: bool) -> djinn.Result:
        with dj.session() as s:
            run = s.generate(PROMPT, max_new_tokens=6, breakpoints=["resid_post.1"], output_logits=True)
            for stop in run:
                if look:
                    assert "likeliest next" in shown(stop) and "on cuda:0" in shown(stop)
                    shown(run)
            return run.result()

    assert_same_bits(told(look=True).logits, told(look=False).logits)
    assert "within tolerance" in shown(dj.receipt)
    shown(dj.run_with_cache(PROMPT, "resid_post")[1])
