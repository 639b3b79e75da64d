"""The key of a captured graph: a digest of everything that an export depends on, or None."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module

from djinn_fx import program, sites, specs
from djinn_fx._version import __version__
from djinn_fx.kernels import ops, signatures
from djinn_fx.passes.describe import Describer, Unfaithful
from djinn_fx.passes.parts import BUILT_IN
from djinn_fx.passes.source import Source
from djinn_fx.specs import ProgramShape

Arenas = Sequence[tuple[torch.Tensor, torch.Tensor]]

#: Attributes of a module that are described otherwise or do not act in a forward pass.
_IDLE = frozenset(
    """
    _parameters _buffers _modules _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks
    _load_state_dict_post_hooks generation_config
    """.split()  # noqa: SIM905 - a table to be read, not a list
)
#: Where models look for ops.
_NAMESPACES: tuple[Any, ...] = (
    *(torch, torch.nn.functional, torch.Tensor, torch_module),
    *(torch.special, torch.linalg, torch.fft, torch._C._nn),
)
#: Sources that decide what a captured graph is, beside the model's own.
_SOURCES = (
    *sorted(Path(__file__).parent.glob("*.py")),
    *(Path(str(module.__file__)) for module in (signatures, ops, program, sites, specs)),
)


def export_key(source: Source, shape: ProgramShape, arenas: Arenas) -> str | None:
    """The key of the captured graph of a language model at ``shape``; None where there can be no faithful one.

    Args:
        source: the model; nobody may be tracing it.
        shape: of the program; ``keep`` does not matter to a capture.
        arenas: keys and values of each layer.
    """
    if source.kind != "lm" or not _alone():
        return None
    try:
        describer = Describer(source.clone)
        _describe_process(describer, source.device)
        describer.say("shape", shape.rows, shape.query, source.kind, source.dtype, source.device)
        for pair in arenas:
            describer.say("arena", *((tuple(t.shape), t.stride(), t.dtype, t.device) for t in pair))
        _describe_tensors(describer, source.clone)
        _describe_modules(describer, source.clone)
    except Exception:  # Unfaithful; or an attribute of the user's that fails when it is looked at
        return None
    return describer.hexdigest()


def _alone() -> bool:
    """Whether nothing but the model's code would see its ops."""
    stacks = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    hooks = [*torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks]
    return not stacks and not hooks


def _describe_process(describer: Describer, device: torch.device) -> None:
    """Versions, sources and the settings of torch that a trace may depend on."""
    describer.say(__version__, torch.__version__, transformers.__version__, platform.python_version())
    for path in _SOURCES:
        try:
            describer.say(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        except OSError as error:
            raise Unfaithful(f"{path}: {error}") from error
    describer.say(torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())
    if device.type == "cuda":
        describer.say(torch.cuda.get_device_capability(device), torch.version.cuda)
    for number, namespace in enumerate(_NAMESPACES):
        describer.say("namespace", number)
        classes = {name: each for name, each in vars(namespace).items() if isinstance(each, type)}
        for name, kind in sorted(classes.items()):
            describer.say(name, kind.__module__, kind.__qualname__)
        found = {name: each for name, each in vars(namespace).items() if name not in classes and _is_code(each)}
        describer.attributes(found)


def _is_code(value: object) -> bool:
    """Whether a member of a namespace acts when an op is called, be it a function, of C or a thing like one."""
    if isinstance(value, ModuleType):
        return False
    return callable(value) or isinstance(value, (*BUILT_IN, property, staticmethod, classmethod))


def _describe_tensors(describer: Describer, clone: nn.Module) -> None:
    """Every parameter and buffer by its form, and which of them are one tensor or share memory."""
    numbers: dict[int, int] = {}
    storages: dict[int, int] = {}
    named = [*clone.named_parameters(remove_duplicate=False), *clone.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        number = numbers.setdefault(id(tensor), len(numbers))
        storage = storages.setdefault(tensor.untyped_storage()._cdata, len(storages))
        form = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device)
        describer.say(name, number, storage, *form, type(tensor).__qualname__, tensor.requires_grad)


def _describe_modules(describer: Describer, clone: nn.Module) -> None:
    """Every submodule by its class and what it holds beside tensors and submodules."""
    for path, module in clone.named_modules(remove_duplicate=False):
        describer.say("module", path)
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unfaithful(f"{path} has hooks")
        describer.type(type(module))
        tensors = {name: each for name, each in vars(module).items() if isinstance(each, torch.Tensor)}
        for name, tensor in tensors.items():  # neither parameter nor buffer, but found by their names all the same
            describer.say("tensor", name)
            describer.constant(tensor)
        describer.attributes(vars(module), _IDLE | tensors.keys())
