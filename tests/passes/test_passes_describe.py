"""What values and code say in a key: the same for equal ones, something else for others."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from djinn_fx.passes import identity
from djinn_fx.passes.bytecode import digest_of, origin_of
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
