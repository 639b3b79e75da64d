"""A digest of what Python values and their code say, for the keys of what is kept on disk.

Tracing a model runs its Python code, so a key must change when that code does: a patched helper, a patched class, a
``forward`` set on one instance. :class:`Describer` walks from a value through attributes, closures and the globals
that functions name. Code of torch is described by its bytecode alone, that of transformers and of the user with all
that it calls. What cannot be described faithfully raises :class:`Unfaithful`; whoever wants a key does without.
"""

from __future__ import annotations

import builtins
import collections
import enum
import functools
import hashlib
import logging
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from djinn_fx.passes.bytecode import digest_of, names_in, origin_of, origin_of_class

#: What a class's body holds beside its members.
_CLASS_ONLY = frozenset(
    """
    __doc__ __module__ __dict__ __weakref__ __annotations__ __abstractmethods__ _abc_impl __dataclass_fields__
    __dataclass_params__ __annotate__ __annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__
    __parameters__ __orig_bases__ __match_args__ __slots__ __qualname__ __hash__
    """.split()  # noqa: SIM905 - a table to be read, not a list
)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type(NotImplemented))
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
#: Values of which the name is enough: none of them decides what is computed.
_OPAQUE = (logging.Logger, logging.LoggerAdapter, types.GenericAlias, types.UnionType, types.ModuleType)
#: Types of C whose state lies in their items and attributes.
_OPEN = frozenset(
    {list, tuple, dict, set, frozenset, collections.OrderedDict, collections.defaultdict, collections.deque}
)
_HEAP_TYPE = 1 << 9
#: Where transformers keeps the code of its models.
_MODELS = "transformers.models."

#: A constant tensor may have so many elements, a description so many steps.
MOST_ELEMENTS, MOST_STEPS = 1 << 16, 400_000


class Unfaithful(Exception):
    """A value that no description would tell from others like it."""


class Describer:
    """Feeds values into a digest, each object once.

    Args:
        root: its submodules, parameters and buffers are described by their names.
    """

    def __init__(self, root: nn.Module) -> None:
        self._digest = hashlib.sha256()
        self._seen: dict[tuple[int, bool], int] = {}
        self._alive: list[object] = []
        self._open: list[int] = []
        self._steps = 0
        self._modules = {id(module): name for name, module in root.named_modules()}
        tensors = [*root.named_parameters(), *root.named_buffers()]
        self._tensors = {id(tensor): name for name, tensor in tensors}

    def hexdigest(self) -> str:
        """The digest of everything said so far."""
        return self._digest.hexdigest()

    def say(self, *words: object) -> None:
        """Add words to the digest as they are."""
        self._digest.update(("\0".join(map(str, words)) + "\1").encode("utf-8", "surrogatepass"))

    def value(self, value: Any, *, strict: bool = True) -> None:
        """Describe any value.

        Args:
            value: what to describe.
            strict: refuse what is not understood; else only its type is said.

        Raises:
            Unfaithful: it holds something that cannot be described.
        """
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise Unfaithful("there is too much to describe")
        kind = type(value)
        if kind in _PLAIN or kind in _TORCH_PLAIN:
            self.say(kind.__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self.say("enum", kind.__qualname__, value.name, repr(value.value))
        elif isinstance(value, torch.Tensor):
            self._tensor(value, strict)
        elif isinstance(value, type):
            self.type(value, strict=strict)
        elif isinstance(value, _OPAQUE) or kind.__module__ == "typing":
            self.say(kind.__name__, getattr(value, "name", None) or getattr(value, "__name__", ""))
        elif kind in _OPEN:
            self._container(value, strict)
        elif not self._known(value, strict):
            self._object(value, strict)

    def attributes(self, attributes: Mapping[str, Any], idle: frozenset[str] = frozenset()) -> None:
        """Describe an object's attributes but for those named by ``idle``.

        Raises:
            Unfaithful: one of them cannot be described.
        """
        for name, value in attributes.items():
            if name not in idle:
                self.say("attribute", name)
                try:
                    self.value(value)
                except Unfaithful as error:
                    raise Unfaithful(f"{name}: {error}") from error

    def _known(self, value: object, strict: bool) -> bool:
        """Whether this very object was described before; if not, it counts as described from here on."""
        key = (id(value), strict)
        if key in self._seen:
            self.say("again", self._seen[key])
            return True
        self._seen[key] = len(self._seen)
        self._alive.append(value)  # else another object may get its identity
        return False

    def _object(self, value: Any, strict: bool) -> None:
        """Describe what may hold itself."""
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            self._container(value, strict)
            self._generic(value, strict)
        elif isinstance(value, types.FunctionType):
            self.function(value, strict=strict)
        elif isinstance(value, nn.Module) and id(value) in self._modules:
            self.say("module", self._modules[id(value)])
        elif (parts := _parts(value)) is not None:
            self.say(type(value).__name__, len(parts))
            for part in parts:
                self.value(part, strict=strict)
        else:
            self._generic(value, strict)

    def _container(self, value: Any, strict: bool) -> None:
        """Describe items. Equal containers say the same, whether or not they are one: copying may change that."""
        self.say(type(value).__qualname__, len(value))
        if id(value) in self._open:
            return self.say("within", self._open.index(id(value)))
        if isinstance(value, Mapping):
            items = [part for pair in value.items() for part in pair]
        else:
            items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
        self._open.append(id(value))
        for item in items:
            self.value(item, strict=strict)
        self._open.pop()
        return None

    def _generic(self, value: Any, strict: bool) -> None:
        """An object by its class and its attributes."""
        kind = type(value)
        self.say("object", kind.__module__, kind.__qualname__)
        if not strict:
            return
        if isinstance(value, nn.Module) and (value._forward_hooks or value._forward_pre_hooks):
            raise Unfaithful(f"a {kind.__qualname__} that has hooks")
        slots = [name for each in kind.__mro__ for name in _slots(each)]
        hidden = any(not each.__flags__ & _HEAP_TYPE and each not in (object, *_OPEN) for each in kind.__mro__)
        if hidden or not (hasattr(value, "__dict__") or slots or isinstance(value, tuple)):
            raise Unfaithful(f"a {kind.__module__}.{kind.__qualname__}, whose state is not seen from Python")
        self.type(kind)
        held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        self.attributes({**getattr(value, "__dict__", {}), **held})

    def _tensor(self, tensor: torch.Tensor, strict: bool) -> None:
        """One of the model's tensors, by its name.

        Another one would be copied into a file, and then not be the one that its owner changes.
        """
        if id(tensor) in self._tensors:
            self.say("tensor", self._tensors[id(tensor)])
        elif strict:
            raise Unfaithful(f"a tensor of shape {tuple(tensor.shape)} that no module holds")
        else:
            self.say("tensor", tuple(tensor.shape), tensor.dtype)

    def constant(self, tensor: torch.Tensor) -> None:
        """Describe a tensor by all that it holds.

        Raises:
            Unfaithful: it is large, or more than strided numbers.
        """
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type == "meta" or tensor.numel() > MOST_ELEMENTS:
            raise Unfaithful(f"a {type(tensor).__name__} of {tensor.numel()} elements")
        self.say(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._digest.update(hashlib.sha256(content).digest())

    # -- code ----------------------------------------------------------------------------------

    def function(self, function: types.FunctionType, *, strict: bool = True) -> None:
        """Describe a function by its code and, unless a version says it all, by what it holds and names.

        Raises:
            Unfaithful: it is the user's, and something that it names cannot be described.
        """
        code = function.__code__
        origin = origin_of(code.co_filename)
        self.say("function", function.__module__, function.__qualname__, digest_of(code))
        if origin in ("torch", "library") or (origin == "installed" and not strict):
            return
        strict = origin != "transformers"
        self.value((function.__defaults__, function.__kwdefaults__, function.__dict__), strict=strict)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents, strict=strict)
            except ValueError:
                self.say("empty cell")
        names = tuple(dict.fromkeys(names_in(code)))
        for name in names:
            if name in function.__globals__ and name not in vars(builtins):
                home = str(function.__globals__.get("__name__"))
                registry = not strict and not home.startswith(_MODELS)
                self._global(name, function.__globals__[name], names, strict, registry)

    def _global(self, name: str, found: Any, names: tuple[str, ...], strict: bool, registry: bool) -> None:
        """Something that a function reads by name; of a module, what else the function may read of it."""
        self.say("global", name)
        if registry and isinstance(found, (dict, list, set)):
            return self.say("registry")  # it grows with whatever else this process loads
        if not isinstance(found, types.ModuleType):
            return self.value(found, strict=strict)
        self.say(found.__name__)
        if found.__name__.partition(".")[0] not in sys.stdlib_module_names:
            for each in names:
                inner = vars(found).get(each)
                if isinstance(inner, (types.FunctionType, type)):
                    self.value(inner, strict=strict)
        return None

    def type(self, kind: type, *, strict: bool = True) -> None:
        """Describe a class by its bases and what its body and theirs define.

        Of the user's classes and those of models in transformers, what their methods name is described too.

        Raises:
            Unfaithful: it is the user's, and holds something that cannot be described.
        """
        for each in kind.__mro__:
            self.say("class", each.__module__, each.__qualname__)
            origin = "library" if each.__module__ == "builtins" else origin_of_class(each)
            plain = origin == "library" or (origin == "torch" and not issubclass(each, nn.Module))
            if plain or (origin == "installed" and not strict) or self._known(each, strict):
                continue
            deep = origin in ("user", "installed") or each.__module__.startswith(_MODELS)
            for name, value in vars(each).items():
                if name not in _CLASS_ONLY:
                    self.say("member", name)
                    self._member(value, deep, strict=origin in ("user", "installed"))

    def _member(self, value: Any, deep: bool, *, strict: bool) -> None:
        """An entry of a class's body; of a class known by its version, bytecode and plain values."""
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            for part in (value.fget, value.fset):
                self._member(part, deep, strict=strict)
        elif deep:
            self.value(value, strict=strict)
        elif isinstance(value, types.FunctionType):
            patched = origin_of(value.__code__.co_filename) == "user"
            self.function(value) if patched else self.say(value.__qualname__, digest_of(value.__code__))
        elif isinstance(value, (*_PLAIN, tuple, list, dict)):
            self.value(value, strict=False)


def _parts(value: Any) -> tuple[Any, ...] | None:
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


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return tuple(n for n in ((slots,) if isinstance(slots, str) else slots) if n not in ("__dict__", "__weakref__"))
