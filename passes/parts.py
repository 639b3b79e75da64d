"""What Python objects are made of, as far as it decides what they do."""

from __future__ import annotations

import functools
import os
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from djinn_fx.passes.bytecode import origin_of

#: What a class's body holds beside its members.
_CLASS_ONLY = frozenset(
    """
    __doc__ __module__ __dict__ __weakref__ __annotations__ __abstractmethods__ _abc_impl __dataclass_fields__
    __dataclass_params__ __annotate__ __annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__
    __parameters__ __orig_bases__ __match_args__ __slots__ __qualname__ __hash__
    """.split()  # noqa: SIM905 - a table to be read, not a list
)
#: Methods of ``nn.Module`` that Dynamo wraps when it first compiles, and one that transformers adds when it first
#: initialises a model. They make modules; none acts in a forward pass.
_LEFT_BEHIND = frozenset({"__init__", "__setstate__", "smart_apply"})
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_CALLABLE = (types.FunctionType, types.MethodType, functools.partial)
_DYNAMO = os.path.join(os.path.dirname(os.path.realpath(str(torch.__file__))), "_dynamo") + os.sep


def parts_of(value: Any) -> tuple[Any, ...] | None:
    """What makes up a thing that wraps or stands for a function; None if it is no such thing."""
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return (value.func, value.args, value.keywords)
    if isinstance(value, property):
        return (value.fget, value.fset)
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return (str(value),)
    if isinstance(value, torch.jit.ScriptFunction):
        return (value.qualified_name, value.code)
    if isinstance(value, re.Pattern):
        return (value.pattern, value.flags)
    if isinstance(value, _BUILT_IN):
        owner = getattr(value, "__self__", None)
        bound = None if isinstance(owner, (types.ModuleType, type)) else owner
        return (getattr(value, "__module__", None), value.__qualname__, bound)
    if callable(value) and isinstance(vars(type(value)).get("__call__"), types.WrapperDescriptorType):
        return (value.__wrapped__,) if hasattr(value, "__wrapped__") else None  # functools.lru_cache
    return None


def slots_of(kind: type) -> tuple[str, ...]:
    """Names of the attributes that a class keeps outside ``__dict__``."""
    slots = vars(kind).get("__slots__", ())
    return tuple(n for n in ((slots,) if isinstance(slots, str) else slots) if n not in ("__dict__", "__weakref__"))


def members_of(kind: type) -> Iterator[tuple[str, Any]]:
    """The members of a class's body in the order of their names, without what libraries leave there in passing."""
    for name, value in sorted(vars(kind).items()):
        if name not in _CLASS_ONLY and not _is_left_behind(kind, name, value):
            yield name, value


def _is_left_behind(kind: type, name: str, value: object) -> bool:
    if kind is not nn.Module:  # what transformers once found out about the source of a model's class
        return name.endswith("_implementation_cached_value") and isinstance(value, bool)
    if name.startswith("___"):  # a mark of Dynamo's
        return True
    known = isinstance(value, types.FunctionType) and origin_of(value.__code__.co_filename) in ("torch", "transformers")
    return known and name in _LEFT_BEHIND


def held_by(wrapper: types.FunctionType) -> list[Any]:
    """What a function of a library holds of others' code: ``torch.no_grad()`` and the like wrap the user's functions.

    The rest of what it holds matters then too, unless it tells Dynamo how to compile: nothing is compiled in a capture.
    """
    contents = [getattr(wrapper, "__wrapped__", None)]
    for cell in wrapper.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    functions = [each for each in contents if isinstance(each, _CALLABLE)]
    foreign = any(_file_of(each) and origin_of(_file_of(each)) in ("user", "installed") for each in functions)
    return contents if foreign and not _file_of(wrapper).startswith(_DYNAMO) else functions


def _file_of(function: Any) -> str:
    """The file of a function's code, or nothing."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)  # a bound method passes on its function's
    return code.co_filename if isinstance(code, types.CodeType) else ""


def found_in(module: types.ModuleType, name: str) -> object:
    """What a module holds by a name, which some modules load only when they are asked for it; None if nothing."""
    if name not in vars(module) and type(module) is not types.ModuleType and name in dir(module):
        try:
            return getattr(module, name)
        except Exception:  # what it needs is not installed
            return None
    return vars(module).get(name)
