"""``djinn-fx inspect``, ``dj.passes``, ``dj.explain()`` and ``DJINN_TRACE`` as a user has them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import djinn_fx as djinn
from djinn_fx.bundled import PATH, storyteller
from djinn_fx.cli import app
from djinn_fx.inspecting.code import count_launches, find_segment, joined
from djinn_fx.inspecting.making import Choice, program_of
from djinn_fx.passes.trace import read
from tests.inspecting.subjects import made


def shown(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["inspect", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_the_bundled_model_by_default() -> None:
    text = shown()
    for word in ("# == pass 4: steer ==", "# yield resid_post.0: 512 bytes alive", "identical to layer 1", "segments"):
        assert word in text
    assert "# == pass 3: head == no change" in text


def test_a_path_is_inspected_without_its_weights(tmp_path: Path) -> None:
    shutil.copy(PATH / "config.json", tmp_path)
    graph = shown(str(tmp_path), "--after", "steer").partition("\n\n")[0]
    assert "pass 4: steer" in graph
    assert graph == shown("--after", "steer").partition("\n\n")[0]


def test_options_narrow_what_is_shown() -> None:
    layer = shown("--after", "yields", "--layer", "2")
    assert "transformer.h.2" in layer
    assert "# transformer.h.1" not in layer
    site = shown("--after", "steer", "--site", "resid_post.1")
    assert 'edits["resid_post.1"].tap' in site
    assert 'edits["resid_post.2"].tap' not in site
    assert "lower" not in shown("--stop-after", "split", "--summary")
    assert "resid_post" in shown("--site", "resid_pst", "--summary", code=2)
    assert shown("--after-all").count("aten.embedding(self.weight, tokens)") == 7


def test_json_is_json() -> None:
    document = json.loads(shown("--json"))
    assert [each["name"] for each in document["passes"]][-1] == "lower"
    assert [each["edited"] for each in document["segments"]] == [True] * 4 + [False]


def test_built_in_shapes_of_any_depth() -> None:
    text = shown("llama-8b-shape", "--layers", "3", "--dtype", "bfloat16", "--summary")
    assert "resid_post.1" in text
    assert "4 segments, 3 structurally different" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["storyteler"], "nearest: storyteller"),
        (["no.jsonl"], "no trace at no.jsonl"),
        (["--after", "lover"], "nearest: lower"),
        (["--layer", "7"], "layers are 0 to 3"),
        (["--site", "resid_pst.1"], "nearest: resid_post.1"),
        (["--stop-after", "stear"], "nearest: steer"),
        (["--variant", "arm"], "choose plain, armed or rank"),
        (["--dtype", "float31"], "name one of torch's"),
        (["--sites", "resid_most"], "no site"),
        (["--measure", "--backend", "c"], "choose auto, eager or inductor"),
        (["--after-all", "--after", "split"], "choose one"),
        (["--stop-after", "roles", "--measure"], "leave --stop-after out"),
        (["--device", "foo"], "--device 'foo'"),
        (["--layers", "-3"], "--layers"),
        (["--tokens", "300"], "storyteller knows 256 positions"),
        (["--html", "no/page.html"], "there is no folder no"),
        (["--jsonl", "."], "is a folder"),
    ],
)
def test_mistakes_are_named(arguments: list[str], words: str) -> None:
    assert words in shown(*arguments, code=2)


def test_what_is_no_json_is_written_elsewhere(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", "--json", "--html", str(tmp_path / "page.html")])
    assert json.loads(done.stdout)["model"] == "storyteller"
    assert "page.html" in done.stderr
    assert CliRunner().invoke(app, ["inspect", "--json", "--variant", "arm"]).stdout == ""


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=96).save_pretrained(tmp_path)
    assert "t5 is no causal language model" in shown(str(tmp_path), code=2)


def test_a_program_is_recorded_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = storyteller()
    folder = tmp_path / "traces"
    dj = djinn.compile(model, tokenizer=tokenizer, max_length=32, verify=False)
    assert not folder.exists()
    monkeypatch.setenv("DJINN_TRACE", str(folder))
    program = dj.program
    (path,) = folder.iterdir()
    assert read(path).records == program.records == dj.passes
    assert "pass 4: steer" in shown(str(path), "--after", "steer")


def test_an_explanation_is_text_a_table_and_html() -> None:
    model, tokenizer = storyteller()
    explained = djinn.compile(model, tokenizer=tokenizer, max_length=32, verify=False).explain()
    for text in (str(explained), repr(explained), f"{explained}"):
        assert "5 segments, 3 structurally different" in text
    out = io.StringIO()
    Console(file=out, width=140).print(explained)
    assert "resid_post.1 to resid_post.2" in out.getvalue() or "resid_post.1 to resid_post.3" in out.getvalue()
    html = explained._repr_html_()
    assert html.count("<table") == html.count("</table>") == 2
    assert "<td" in html
    assert "->" not in html.replace("-&gt;", "")


def test_a_modules_explanation() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    dj = djinn.compile(module, example_inputs=(torch.zeros(2, 3),))
    assert "Sequential" in str(dj.explain())


def test_launches_are_counted_in_generated_code() -> None:
    code = """
        buf0 = empty_strided_cpu((1, 8), (8, 1), torch.float32)
        cpp_fused_add_0(arg0_1, buf0)
        extern_kernels.mm(buf0, arg1_1, out=buf1)
        triton_poi_fused_add_0.run(arg0_1, buf0, 8, stream=stream0)
        buf2 = torch.ops.djinn.attention.default(buf1)
        assert_size_stride(arg0_1, (1, 8), (8, 1))
    """
    assert count_launches(code) == 4


@torch.no_grad()
def test_joined_segments_compute_what_both_do() -> None:
    program = program_of(made("llama-4"), Choice(variant="plain"))
    one, two = program.segments[1:3]
    graph = joined(one, two)
    results = next(iter(reversed(graph.graph.nodes))).args[0]
    kept = {value.name for value in two.live}
    assert len(results) == len([name for name in dict.fromkeys([*one.outputs, *two.outputs]) if name in kept])
    ops = [sum(n.op == "call_function" for n in g.graph.nodes) for g in (one.graph, two.graph, graph)]
    assert ops[0] + ops[1] == ops[2]


def test_a_segment_is_found_by_number_name_or_site() -> None:
    program = program_of(made("llama-4"), Choice())
    assert {find_segment(program, each).index for each in ("2", "segment_2", "resid_post.2")} == {2}
    with pytest.raises(djinn.errors.InvalidValue, match="numbered 0 to 4"):
        find_segment(program, "resid_post.7")


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on the CPU")
def test_inductors_code_is_one_flag_away() -> None:
    code = shown("--code", "4")
    assert code.startswith("# == segment_4 ==")
    assert "extern_kernels.mm" in code or "extern_kernels.addmm" in code
    assert count_launches(code) >= 2
