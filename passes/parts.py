"""What Python objects are made of, as far as it decides what they do."""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import operator
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from djinn_fx.passes.bytecode import is_foreign, origin_of, origin_of_module

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
#: Functions of C and the like, of which the name is enough.
BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
#: What reads variables by computed names, the environment or files, whatever name it goes by.
_READERS = (
    *(builtins.compile, builtins.delattr, builtins.eval, builtins.exec, builtins.getattr, builtins.globals),
    *(builtins.input, builtins.locals, builtins.open, builtins.setattr, builtins.vars, builtins.__import__),
    *(os.environ, os.environb, os.getenv, os.getenvb, importlib.import_module, importlib.reload, sys._getframe),
    *(operator.attrgetter, operator.methodcaller, inspect.currentframe, inspect.getattr_static, inspect.getmembers),
)
_UNSEEN = frozenset(map(id, _READERS))
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
    if isinstance(value, BUILT_IN):
        owner = getattr(value, "__self__", None)
        nobody = isinstance(owner, (types.ModuleType, type)) or type(owner).__module__ == "pybind11_builtins"
        bound = None if nobody or type(owner).__name__ == "PyCapsule" else owner
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


def is_unseen(value: object) -> bool:
    """Whether a value gives code what no description of that code would follow."""
    return id(value) in _UNSEEN


def is_strange(module: types.ModuleType) -> bool:
    """Whether a module is the user's or of a package that transformers does not call by itself."""
    if origin_of_module(module) != "installed":
        return origin_of_module(module) == "user"
    return is_foreign(vars(module)["__file__"])


def read_from(module: types.ModuleType, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """What a module holds by names. Some modules load it, or make it up, only when they are asked for it."""
    own = origin_of_module(module) in ("user", "installed")
    lazy = type(module) is not types.ModuleType or "__getattr__" in vars(module)
    known = () if own or not lazy or type(module) is types.ModuleType else dir(module)
    for name in names:
        if name in vars(module):
            yield name, vars(module)[name]
        elif (lazy and own) or name in known:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = getattr(module, name)
            except Exception:  # there is no such thing, or what it needs is not installed
                continue
            yield name, found
