"""What the benchmark command is given that it cannot use, and runs that end early."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from djinn_fx.benchmarks import registry
from djinn_fx.benchmarks.context import Context
from djinn_fx.benchmarks.record import Json
from djinn_fx.benchmarks.registry import Benchmark
from djinn_fx.cli import app


def bench(*words: str, width: int = 200) -> tuple[int, str]:
    shown = CliRunner().invoke(app, ["bench", *words], env={"COLUMNS": str(width)})
    return shown.exit_code, shown.output


def use(monkeypatch: pytest.MonkeyPatch, *parts: Json | BaseException) -> None:
    """Run, under the name of ``harvest``, parts that give a value or raise."""

    def measure(context: Context) -> dict[str, Json]:
        return {str(n): context.part(str(n), lambda part=part: give(part)) for n, part in enumerate(parts)}  # type: ignore[misc]

    def give(part: Json | BaseException) -> Json:
        if isinstance(part, BaseException):
            raise part
        return part

    entry = Benchmark("harvest", measure, lambda record: [], lambda record: [])
    monkeypatch.setattr(registry, "find", lambda name: entry)


@pytest.mark.parametrize(
    "words",
    [
        ("--device", "abacus"),
        ("--device", "cuda:99"),
        ("--dtype", "float31"),
        ("--dtype", "nn"),
        ("--dtype", "int8"),
        ("--seed", "-1"),
        ("--seed", "9" * 30),
        ("--budget-seconds", "-5"),
        ("--budget-seconds", "nan"),
        ("--budget-seconds", "inf"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_anything_runs(
    words: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, AssertionError("it ran"))
    code, said = bench("harvest", "--model", "tiny", *words, "--out", str(tmp_path / "new"))
    assert code == 2 and words[0] in said and "give" in said and "it ran" not in said
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        registry.main("harvest", ["--model", "tiny", *words, "--out", str(tmp_path / "new")])


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, AssertionError("it ran"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = bench("harvest", "--model", "tiny", "--out", str(out))
        assert code == 2 and "--out" in said and "give another" in said and "it ran" not in said
    with pytest.raises(SystemExit):
        registry.main("harvest", ["--model", "tiny", "--out", str(tmp_path / "file")])
    assert "give another" in capsys.readouterr().err


def test_an_interrupted_run_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, {"median": 2.0}, KeyboardInterrupt())
    where = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    left = tmp_path / "harvest_tiny.parts.jsonl"
    code, said = bench("harvest", *where)
    assert code == registry.INTERRUPTED and f"interrupted: the parts done so far are in {left}" in said
    assert left.read_text() == '{"part": "0", "found": {"median": 2.0}}\n'
    assert registry.main("harvest", where) == registry.INTERRUPTED
    assert str(left) in capsys.readouterr().out
    use(monkeypatch, KeyboardInterrupt())
    assert "no part was done" in bench("harvest", *where)[1] and not left.exists()


def test_an_errors_text_is_no_markup(tmp_path: Path) -> None:
    code, said = bench("harvest", "--model", "[/bold]", "--out", str(tmp_path))
    assert code == 2 and "[/bold]" in said


def test_a_narrow_terminal_shows_every_digit(tmp_path: Path) -> None:
    from rich.console import Console

    from djinn_fx.benchmarks.tables import Table
    from djinn_fx.cli_bench import _rich

    console = Console(width=20, record=True, quiet=False, file=(tmp_path / "shown").open("w"))
    console.print(_rich(Table("A [/title]", ["a [/head]", "b", "c"], [["123,456,789", "0.123456", "[/cell]"]])))
    assert "…" not in console.export_text()
    console.file.close()


def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, said = bench("decode", "--quick", "--model", str(tmp_path / "nosuch"), "--out", str(tmp_path))
    assert status == 2
    assert "nosuch" in said and "Built in: gpt2, llama-8b-shape, tiny, storyteller" in said
