"""How a recorded graph is written as Python: the names of its values, its inputs and its ops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from djinn_fx.program import NodeInfo

#: A reference to another node, or a string literal, inside which nothing is one.
_REFERENCE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|%(\d+)")
_KV = re.compile(r"kv\.(\d+|\*)\.([kv])")
_GETITEM = "<built-in function getitem>"
_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "float64": "f64",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
    "bool": "b8",
}

#: Roles that sites have; a module may be called like one only at the top of a model.
_ROLE = re.compile(r"(?:(?:resid|attn|mlp)_[a-z]+\.\d+|embed|final_norm|logits)")


def references(args: str) -> list[int]:
    """Origins of the nodes that an argument text reads, in order."""
    return [int(match[1]) for match in _REFERENCE.finditer(args) if match[1]]


def substitute(args: str, said: Callable[[int], str]) -> str:
    """An argument text with every reference replaced by what ``said`` makes of its origin."""
    return _REFERENCE.sub(lambda match: said(int(match[1])) if match[1] else match[0], args)


def form(dtype: str, shape: str) -> str:
    """Dtype and shape in short: ``f32[1, 1, 64]``."""
    return f"{_SHORT.get(dtype, dtype)}{shape}" if shape else ""


@dataclass(frozen=True)
class Names:
    """Names of the values of one recorded graph, or of two that a pass lies between.

    Attributes:
        by_origin: the node that each origin stands for.
    """

    by_origin: dict[int, NodeInfo]
    _used: frozenset[int] = frozenset()
    _twice: frozenset[str] = field(default=frozenset())

    @classmethod
    def of(cls, *graphs: Iterable[NodeInfo]) -> Names:
        """Names over graphs; where two know an origin, the last one names it."""
        by_origin = {info.origin: info for graph in graphs for info in graph}
        counts = Counter(info.name for info in by_origin.values() if info.op == "call_function")
        used = frozenset(ref for graph in graphs for info in graph for ref in references(info.args))
        return cls(by_origin, used, frozenset(name for name, count in counts.items() if count > 1))

    def value(self, origin: int, module: str = "") -> str:
        """What a reader in ``module`` calls a value."""
        info = self.by_origin.get(origin)
        if info is None:
            return f"%{origin}"
        if info.op == "placeholder":
            return input_name(info.target, module)
        return f"{info.name}_{origin}" if info.name in self._twice else info.name

    def statement(self, info: NodeInfo) -> str:
        """A node as a line of Python."""
        said = substitute(info.args, lambda origin: self.value(origin, info.module))
        if info.op == "output":
            return f"return {said}"
        if info.target == _GETITEM:
            source, _, index = said.rpartition(", ")
            call = f"{source}[{index}]"
        else:
            call = f"{info.target.removesuffix('.default')}({said})"
        if not info.shape and info.origin not in self._used:
            return call
        return f"{self.value(info.origin)} = {call}"


def input_name(env: str, module: str = "") -> str:
    """What an input is called: ``kv[6].k``, ``edits["site"].tap``, ``w["path"]``, or ``self.weight``."""
    kind, _, rest = env.partition(".")
    if kind in ("w", "c") and rest:
        own = rest.removeprefix(f"{module}.")
        if module and own != rest and re.fullmatch(r"[A-Za-z_][\w.]*", own) and not re.search(r"\.\d", own):
            return f"self.{own}"
        return f'{kind}["{rest}"]'
    match = _KV.fullmatch(env)
    if match:
        return f"kv[{match[1]}].{match[2]}"
    site, colon, part = env.rpartition(":")
    if colon:
        return f'edits["{site}"].{part}'
    return env if env.isidentifier() else f'inputs["{env}"]'


def remark(info: NodeInfo) -> str:
    """What stands behind a line: the value's form and its names.

    Names with a role, if there are any; else the path of a module, unless it is the one that the line stands under.
    """
    names = info.site.split()
    shown = [name for name in names if has_role(name)] or [name for name in names if name != info.module][:1]
    more = len(names) - len(shown)
    text = " ".join(shown) + (f" (+{more})" if shown and more else "")
    return "  ".join(part for part in (form(info.dtype, info.shape), text) if part)


def has_role(name: str) -> bool:
    """Whether a site's name is a role's (``resid_post.6``), not a module's path."""
    return _ROLE.fullmatch(name) is not None
