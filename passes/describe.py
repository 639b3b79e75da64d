"""A digest of what Python values and their code say, for the keys of what is kept on disk.

Tracing a model runs its Python code, so a key must change when that code does: a patched helper, a patched class, a
``forward`` set on one instance. :class:`Describer` walks from a value through attributes, closures and the globals
that functions name. Code of torch is described by its bytecode and the functions that it wraps, that of transformers
and of the user with all that it calls, the user's with all that it reads through modules too. What cannot be
described faithfully raises :class:`Unfaithful`; whoever wants a key does without. What libraries load or patch at
first use is left out where it does not act on the model.
"""

from __future__ import annotations

import builtins
import collections
import enum
import hashlib
import logging
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import GeneralInterface

from djinn_fx.passes.bytecode import (
    digest_of,
    is_foreign,
    names_in,
    origin_of,
    origin_of_class,
    origin_of_module,
    unseen_in,
    words_in,
)
from djinn_fx.passes.parts import (
    BUILT_IN,
    held_by,
    is_strange,
    is_unseen,
    members_of,
    parts_of,
    read_from,
    slots_of,
)

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(Ellipsis), type(NotImplemented))
_TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
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
        configs = [getattr(vars(module).get("config"), "__dict__", {}) for module in root.modules()]
        self._chosen = {value for config in configs for value in config.values() if isinstance(value, str)}

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
        if strict and is_unseen(value):
            raise Unfaithful(f"{value!r}"[:80])
        kind = type(value)
        if kind in _PLAIN or kind in _TORCH_PLAIN:
            self.say(kind.__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self.say("enum", kind.__qualname__, value.name, repr(value.value))
        elif isinstance(value, torch.Tensor):
            self._tensor(value, strict)
        elif isinstance(value, type):
            self.type(value, strict=strict)
        elif isinstance(value, types.ModuleType) and is_strange(value):
            raise Unfaithful(f"the module {value.__name__}, of which anything may be read")
        elif isinstance(value, _OPAQUE) or kind.__module__ == "typing":
            self.say(kind.__name__, getattr(value, "name", None) or getattr(value, "__name__", ""))
        elif kind in _OPEN:
            self._container(value, strict)
        elif not self._known(value, strict):
            self._object(value, strict)

    def attributes(self, attributes: Mapping[str, Any], idle: frozenset[str] = frozenset()) -> None:
        """Describe an object's attributes, in whatever order they were set, but for those named by ``idle``.

        Raises:
            Unfaithful: one of them cannot be described.
        """
        for name, value in sorted(attributes.items(), key=lambda item: str(item[0])):
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
        if isinstance(value, GeneralInterface) and origin_of_class(type(value)) == "transformers":
            self._interface(value, strict)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)):
            self._container(value, strict)
            self._generic(value, strict)
        elif isinstance(value, types.FunctionType):
            self.function(value, strict=strict)
        elif isinstance(value, nn.Module) and id(value) in self._modules:
            self.say("module", self._modules[id(value)])
        elif (parts := parts_of(value)) is not None:
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
        if not strict and origin_of_class(kind) != "user":
            return
        if isinstance(value, nn.Module) and (value._forward_hooks or value._forward_pre_hooks):
            raise Unfaithful(f"a {kind.__qualname__} that has hooks")
        slots = [name for each in kind.__mro__ for name in slots_of(each)]
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
            Unfaithful: it is the user's, and something that it names or may reach otherwise cannot be described.
        """
        code = function.__code__
        origin = origin_of(code.co_filename)
        strict = strict or is_foreign(code.co_filename)
        self.say("function", function.__module__, function.__qualname__, digest_of(code))
        if origin in ("torch", "library") or (origin == "installed" and not strict):
            for part in held_by(function):
                self.value(part, strict=strict)
            return
        strict = origin != "transformers"
        if strict and (unseen := unseen_in(code)) is not None:
            raise Unfaithful(f"{function.__qualname__}, which uses {unseen}")
        names, words = tuple(dict.fromkeys(names_in(code))), frozenset(words_in(code))
        read = tuple(dict.fromkeys((*names, *sorted(words)))) if strict else names
        self.value((function.__defaults__, function.__kwdefaults__, function.__dict__), strict=strict)
        for cell in function.__closure__ or ():
            try:
                self._global(cell.cell_contents, read, strict)
            except ValueError:
                self.say("empty cell")
        for name in names:
            usual = vars(builtins).get(name)
            if name not in function.__globals__:
                if usual is not None:
                    self.value(usual, strict=strict)
            elif function.__globals__[name] is not usual and not (name.startswith("__") and name in vars(builtins)):
                home = str(function.__globals__.get("__name__"))
                registry = not strict and not home.startswith(_MODELS)
                found = function.__globals__[name]
                self.say("global", name)
                if registry and isinstance(found, (dict, list, set)):
                    self.say("registry")  # it grows with whatever else this process loads
                elif isinstance(found, GeneralInterface):
                    self._interface(found, strict, words)
                else:
                    self._global(found, read, strict)

    def _global(self, found: Any, names: tuple[str, ...], strict: bool) -> None:
        """Something that a function reads by name; of a module, what else the function may read of it."""
        if isinstance(found, types.ModuleType):
            return self._module(found, names, strict, set())
        return self.value(found, strict=strict)

    def _module(self, module: types.ModuleType, names: tuple[str, ...], strict: bool, passed: set[int]) -> None:
        """What a function may read of a module and those within it: for the user's functions whatever it is.

        Of what others read, only code.
        """
        passed.add(id(module))
        self.say(module.__name__)
        origin, strict = origin_of_module(module), strict or is_strange(module)
        for name, inner in read_from(module, names):
            if isinstance(inner, types.ModuleType):
                if strict and id(inner) not in passed and not type(inner).__module__.startswith("torch."):
                    self._module(inner, names, strict, passed)
            elif strict or (callable(inner) and (origin != "library" or isinstance(inner, BUILT_IN))):
                self.say("of a module", name)
                self.value(inner, strict=strict)

    def _interface(self, interface: GeneralInterface, strict: bool, words: frozenset[str] = frozenset()) -> None:
        """A table of transformers from which a model takes functions by name: those that this one may take.

        The others come and go with what else this process uses; some change themselves when they first run.

        Args:
            interface: of attention, masks or experts.
            strict: as for :meth:`value`.
            words: names in the code that uses it; those in a configuration of the model are known.
        """
        self.say("interface", type(interface).__qualname__)
        for name in sorted(interface):
            if name in words or name in self._chosen:
                self.say("entry", name)
                self.value(interface[name], strict=strict)
        self.value(getattr(type(interface), "get_interface", None), strict=False)

    def type(self, kind: type, *, strict: bool = True) -> None:
        """Describe a class by its bases and what its body and theirs define.

        Of the user's classes and those of models in transformers, what their methods name is described too.

        Raises:
            Unfaithful: it is the user's, and holds something that cannot be described.
        """
        if origin_of_class(type(kind)) in ("user", "installed") and (strict or origin_of_class(type(kind)) == "user"):
            self.type(type(kind))
        for each in kind.__mro__:
            self.say("class", each.__module__, each.__qualname__)
            origin = "library" if each.__module__ == "builtins" else origin_of_class(each)
            plain = origin == "library" or (origin == "torch" and not issubclass(each, nn.Module))
            if plain or (origin == "installed" and not strict) or self._known(each, strict):
                continue
            deep = origin in ("user", "installed") or each.__module__.startswith(_MODELS)
            for name, value in members_of(each):
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
            patched = is_foreign(value.__code__.co_filename)
            self.function(value) if patched else self.say(value.__qualname__, digest_of(value.__code__))
        elif isinstance(value, (dict, list, set)):
            self.say("registry")
        elif isinstance(value, (*_PLAIN, tuple, *BUILT_IN)):
            self.value(value, strict=False)
        elif callable(value) and not isinstance(value, type):
            self.value(value)
