"""Commands that change what a run computes: set, steer, unsteer."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from djinn_fx.debugger.bounds import Budget, TooLarge
from djinn_fx.debugger.expressions import explain, parse
from djinn_fx.debugger.whitelist import BINARY
from djinn_fx.debugger.words import amount
from djinn_fx.errors import InvalidValue
from djinn_fx.runtime.wording import numbers

if TYPE_CHECKING:
    from djinn_fx.debugger.interpreter import Debugger

_SET = re.compile(r"(?P<target>h(?:\[.*?\])?)\s*(?P<op>[-+*/]?=)(?!=)\s*(?P<value>.+)$")
_OPERATORS: Mapping[str, type[ast.operator]] = {"+=": ast.Add, "-=": ast.Sub, "*=": ast.Mult, "/=": ast.Div}


def set_(d: Debugger, rest: str) -> None:
    """Change the activation in place; where it fails nothing is changed."""
    match = _SET.match(rest)
    if match is None:
        raise InvalidValue(f"cannot read {rest!r}: set h *= 0.9, set h[-1] = 0, set h[-1, 5] += 1.")
    op, source, stop = match["op"], match["value"], d.stop
    value, python = explain(source, d.names(source), d.python_names())
    if not isinstance(value, (bool, int, float, torch.Tensor)):
        raise InvalidValue(f"{source!r} is neither a number nor a tensor.")
    index, place = _place(d, match["target"])
    new = stop.value.detach().clone()
    try:
        new[index] = value if op == "=" else Budget().call(BINARY[_OPERATORS[op]], new[index], value)
    except (TooLarge, RuntimeError, IndexError, TypeError) as error:
        raise InvalidValue(f"cannot set {match['target']}: {str(error).splitlines()[0]}") from error
    stop.value.copy_(new)
    d.say_python(f"stop{d.current}.value[{place}] {op} {python}")
    d.write(numbers(stop.value[-1]))


def _place(d: Debugger, target: str) -> tuple[Any, str]:
    """The index of ``h[...]``, evaluated by the expressions' own rules, and its Python."""
    tree = parse(target)
    if isinstance(tree, ast.Name):
        return ..., "..."
    if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name) or tree.value.id != "h":
        raise InvalidValue("the target is h or h[...].")
    names, python = d.names(target), d.python_names()
    explain(tree, names, python)  # checks that it is in range
    return explain(tree.slice, names, python)


def _vector(given: str) -> tuple[torch.Tensor, str]:
    """The one tensor of a safetensors file, and the Python that reads it."""
    path = Path(given).expanduser()
    if not path.is_file():
        raise InvalidValue(f"there is no file {given}; give a safetensors file that holds one tensor.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InvalidValue(f"{given} is damaged, or no safetensors file: {error}.") from error
    if len(tensors) != 1:
        raise InvalidValue(
            f"{given} holds {len(tensors)} tensors; this takes a file with one. (What `save` writes is a checkpoint.)"
        )
    return next(iter(tensors.values())), f"next(iter(safetensors.torch.load_file({str(path)!r}).values()))"


def steer(d: Debugger, rest: str) -> None:
    """Edit a site from here on."""
    words = rest.split()
    known = len(words) in (3, 4) and words[1] in ("scale", "add", "ablate")
    if not known or (len(words) == 4 and words[1] != "add"):
        raise InvalidValue("steer SITE scale X | add FILE.safetensors [STRENGTH] | ablate FILE.")
    site, how, what = words[:3]
    session = d.session
    options: dict[str, Any]
    if how == "scale":
        options = {"scale": amount(what, "scale")}
        python = f"scale={_literal(options['scale'])}"
    else:
        vector, load = _vector(what)
        options, python = {how: vector}, f"{how}={load}"
        if len(words) == 4:
            options["strength"] = amount(words[3], "strength")
            python += f", strength={_literal(options['strength'])}"
    d.compile_in(d.dj.sites.select(site))
    session.steer(site, **options)
    d.say_python(f"s{d.current}.steer({site!r}, {python})")
    d.write(f"steering {d.dj.sites.get(site).name} from here on")


def _literal(value: float) -> str:
    """A float in Python, infinities and NaN too."""
    return repr(value) if value - value == 0 else f"float({str(value)!r})"


def unsteer(d: Debugger, rest: str) -> None:
    """End an edit."""
    if not rest:
        raise InvalidValue("give a site: unsteer resid_post.1.")
    site, handles = d.dj.sites.get(rest).name, d.session.handles
    if site not in handles:
        raise InvalidValue(f"{site} is not steered here; steered: {', '.join(handles) or 'nothing'}.")
    handles[site].remove()
    d.say_python(f"s{d.current}.handles[{site!r}].remove()")
