"""What values and code say in a key: the same for equal ones, something else for others."""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import sys
import types
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from djinn_fx.passes import identity
from djinn_fx.passes.bytecode import digest_of, is_foreign, origin_of
from djinn_fx.passes.describe import Describer, Unfaithful


def described(value: Any) -> str:
    describer = Describer(nn.Module())
    describer.value(value)
    return describer.hexdigest()


class Plain:
    """An object with an attribute."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    "wrap", [torch.no_grad(), torch.compiler.disable, torch.compile, torch.vmap, contextlib.contextmanager]
)
def test_what_a_library_wraps_is_told_apart(wrap: Callable[[Any], Any]) -> None:
    """A decorated function is described by its own code, not by that of the decorator."""

    def adder(number: int) -> Any:
        return wrap(lambda x: x + number)

    assert described(adder(1)) == described(adder(1)) != described(adder(2))


def test_what_a_module_loads_late_is_described() -> None:
    """Whether or not it was loaded before."""

    class Lazy(types.ModuleType):
        def __dir__(self) -> list[str]:
            return ["Late", "Absent"]

        def __getattr__(self, name: str) -> Any:
            if name != "Late":
                raise RuntimeError(name)
            vars(self)[name] = Plain
            return Plain

    module = Lazy("lazy")
    code = compile("def f(): return lazy.Late, lazy.Absent, lazy.Missing", "<some file>", "exec")
    space: dict[str, Any] = {"lazy": module}
    exec(code, space)
    before = described(space["f"])
    assert "Late" in vars(module)
    assert described(space["f"]) == before
    vars(module)["Late"] = Describer
    assert described(space["f"]) != before


def test_values_are_told_apart() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    values: list[Any] = [
        *(1, 1.0, True, "1", b"1", None, (1,), [1], {1}, {1: 2}, {2: 1}, loop, torch.float16, torch.Size([1])),
        *(Plain(1), Plain(2), Plain, len, torch.relu, MethodType, lambda: 1, lambda: 2, lambda x=1: x, lambda x=2: x),
    ]
    assert len({described(value) for value in values}) == len(values)
    shared = [1, 2]
    assert described([shared, shared]) == described([[1, 2], [1, 2]])
    assert described({"b", "a"}) == described({"a", "b"})
    with pytest.raises(Unfaithful, match="held"):
        described(Plain(iter([])))


def test_code_is_told_apart_by_what_it_does() -> None:
    def compiled(text: str) -> str:
        return digest_of(compile(text, "<some file>", "exec"))

    assert compiled("def f(): return 1") == compiled("\n\ndef f():\n    return 1")
    texts = ["def f(): return 1", "def f(): return 2", "def f(): return x", "def f(): return y", "def f(x): return x"]
    assert len({compiled(text) for text in texts}) == len(texts)
    assert compiled("x in {'a', 'b'}") == compiled("x in {'b', 'a'}")
    files = (torch.__file__, modeling_llama.__file__, identity.__file__, pytest.__file__, os.__file__, __file__)
    wanted = ["torch", "transformers", "library", "installed", "library", "user"]
    assert [origin_of(file) for file in files] == wanted


class Settings:
    """Read as an attribute of a module's attribute."""

    scale = 1.0


def consts(**held: Any) -> types.ModuleType:
    """A module of the user's."""
    module = types.ModuleType("consts")
    vars(module).update(
        {"SCALE": 1.0, "CFG": Plain(1.0), "TABLE": {"s": [1.0]}, "NOTHING": None, "S": Settings, **held}
    )
    return module


def reader(text: str, **space: Any) -> Any:
    """A function of the user's that returns what ``text`` says."""
    exec(compile(f"def f(x): return {text}", "<some file>", "exec"), space)
    return space["f"]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("consts.SCALE * x", {"SCALE": 2.0}),
        ("consts.SCALE * x", {"SCALE": True}),
        ("consts.CFG.held", {"CFG": Plain(2.0)}),
        ("consts.TABLE['s'][0]", {"TABLE": {"s": [2.0]}}),
        ("consts.NOTHING", {"NOTHING": "x"}),
        ("consts.S.scale", {"S": type("S", (), {"scale": 2.0})}),
        ("consts.inner.SCALE", {"inner": consts(SCALE=2.0)}),
        ("[consts.SCALE for _ in x]", {"SCALE": 2.0}),
    ],
)
def test_what_is_read_through_a_module_is_described(text: str, held: dict[str, Any]) -> None:
    before = described(reader(text, consts=consts(inner=consts())))
    assert before == described(reader(text, consts=consts(inner=consts())))
    assert before != described(reader(text, consts=consts(**{"inner": consts(), **held})))


def test_modules_are_read_wherever_they_are_held() -> None:
    """In closures as among globals; another module's lists; made up when asked for; from nowhere else."""

    def closed(module: Any) -> Any:
        return lambda x: x * module.SCALE

    assert described(closed(consts())) == described(closed(consts())) != described(closed(consts(SCALE=2.0)))
    made = [consts(__getattr__=lambda name, value=value: value) for value in (1.0, 2.0)]
    assert described(reader("m.MADE", m=made[0])) != described(reader("m.MADE", m=made[1]))
    assert described(reader("sum(x)")) != described(reader("sum(x)", sum=lambda x: x))
    for value in (Plain(consts()), [consts()]):
        with pytest.raises(Unfaithful, match="module consts"):
            described(value)
    with pytest.raises(Unfaithful, match="tensor"):
        described(reader("m.T", m=consts(T=torch.zeros(1))))
    assert described(reader("m.nn.functional.silu(x)", m=torch)) == described(
        reader("m.nn.functional.silu(x)", m=torch)
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "getattr(consts, 'SCALE')",
            "globals()['G']",
            "eval('G')",
            "vars(consts)['SCALE']",
            "consts.__dict__['SCALE']",
        ),
        *("float(os.environ.get('SCALE'))", "os.getenv('SCALE')", "env['SCALE']", "get('SCALE')", "[read(x, 'G')]"),
        *("__import__('consts').SCALE", "load_module('consts').SCALE", "open('scale').read()", "take('SCALE')(consts)"),
        *("sys.modules['consts'].SCALE", "(lambda: getattr(consts, 'SCALE'))()"),
    ],
)
def test_code_that_reads_what_it_does_not_name_has_no_description(text: str) -> None:
    names = {"env": os.environ, "get": os.getenv, "read": getattr, "take": operator.attrgetter}
    space = {"os": os, "sys": sys, "consts": consts(), "G": 1, "load_module": importlib.import_module, **names}
    with pytest.raises(Unfaithful):
        described(reader(text, **space))


def test_code_that_imports_has_no_description() -> None:
    space: dict[str, Any] = {}
    text = "def f(x):\n    from consts import SCALE\n    return x * SCALE\ndef g(x): return f(x)"
    exec(compile(text, "<some file>", "exec"), space)
    for name in "fg":
        with pytest.raises(Unfaithful, match="import"):
            described(space[name])


def test_whose_code_it_is() -> None:
    """A package that transformers does not call by itself is as the user's."""
    folder = os.path.dirname(os.path.dirname(pytest.__file__))
    files = {"vendor/patch.py": True, "tqdm/std.py": False, "huggingface_hub/x.py": False}
    for name, foreign in files.items():
        assert is_foreign(os.path.join(folder, name)) is foreign
    assert is_foreign(__file__)
    assert not is_foreign(torch.__file__)
    assert not is_foreign(os.__file__)
