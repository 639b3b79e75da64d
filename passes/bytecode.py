"""What code says: digests of bytecode, and whose code it is."""

from __future__ import annotations

import dis
import functools
import hashlib
import itertools
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Literal

import torch
import transformers

Origin = Literal["torch", "transformers", "library", "installed", "user"]

_HERE = os.path.dirname(os.path.realpath(__file__))


def _folder(module: types.ModuleType) -> str:
    return os.path.dirname(os.path.realpath(str(module.__file__))) + os.sep


#: Whose code lies where; the standard library and this package's own rooms are ``"library"``.
_FOLDERS: tuple[tuple[str, Origin], ...] = (
    (_folder(torch), "torch"),
    (_folder(transformers), "transformers"),
    (_HERE + os.sep, "library"),
    (os.path.join(os.path.dirname(_HERE), "kernels") + os.sep, "library"),
)
_STANDARD = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep
_INSTALLED = ("site-packages", "dist-packages")
#: Packages that transformers calls where nobody patched it; others reach its code as patches.
_COMPANIONS = frozenset(
    """
    PIL accelerate bitsandbytes causal_conv1d deepspeed einops filelock fla flash_attn flash_attn_interface httpx
    huggingface_hub kernels mamba_ssm numpy packaging pydantic regex requests safetensors scipy timm tokenizers
    torchvision tqdm typing_extensions.py yaml
    """.split()  # noqa: SIM905 - a table to be read, not a list
)
#: Names by which code reaches what no description follows: variables by computed names, the environment, files.
_UNSEEN = frozenset(
    """
    __builtins__ __dict__ __getattribute__ __globals__ __import__ _getframe attrgetter compile currentframe delattr
    environ environb eval exec f_back f_globals f_locals fromfile getattr getattr_static getenv getenvb getmembers
    globals import_module input load load_file loads locals methodcaller open read_bytes read_text reload setattr vars
    """.split()  # noqa: SIM905 - a table to be read, not a list
)


@functools.cache
def origin_of(file: str) -> Origin:
    """Whose code lies in a file; what is neither known nor installed is the user's."""
    path = os.path.realpath(file)
    for folder, origin in _FOLDERS:
        if path.startswith(folder):
            return origin
    if any(part in path for part in _INSTALLED):
        return "installed"
    return "library" if path.startswith(_STANDARD) or file.startswith("<frozen") else "user"


@functools.cache
def is_foreign(file: str) -> bool:
    """Whether code in a file is the user's or of a package that transformers does not call by itself."""
    if origin_of(file) != "installed":
        return origin_of(file) == "user"
    parts = os.path.realpath(file).split(os.sep)
    return not any(one in _INSTALLED and two in _COMPANIONS for one, two in itertools.pairwise(parts))


def origin_of_module(module: types.ModuleType) -> Origin:
    """Whose module it is, by its file or, for modules of C, by its name."""
    file = vars(module).get("__file__")
    if isinstance(file, str):
        return origin_of(file)
    root = str(vars(module).get("__name__")).partition(".")[0]
    if root in sys.stdlib_module_names:
        return "library"
    return "torch" if root == "torch" else "user"


def origin_of_class(kind: type) -> Origin:
    """Whose class it is, by the file of the module that defines it."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if kind.__module__ in sys.builtin_module_names:
        return "library"
    return origin_of(file) if file else "user"


def digest_of(code: types.CodeType) -> str:
    """A digest of bytecode, constants and names, inner functions included; not of where the source stands."""
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    digest = hashlib.sha256(code.co_code + code.co_exceptiontable)
    digest.update(repr((names, counts, [_constant(each) for each in code.co_consts])).encode("utf-8", "replace"))
    return digest.hexdigest()


def _constant(constant: object) -> str:
    if isinstance(constant, types.CodeType):
        return digest_of(constant)
    if isinstance(constant, frozenset):  # its order differs from process to process
        return repr(sorted(map(_constant, constant)))
    if isinstance(constant, tuple):
        return repr([_constant(each) for each in constant])
    return f"{type(constant).__name__} {constant!r}"


def names_in(code: types.CodeType) -> Iterator[str]:
    """Every global and attribute that code names, that of inner functions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def unseen_in(code: types.CodeType) -> str | None:
    """What code, inner functions included, uses that no description of what it names would follow; None if nothing."""
    if any(instruction.opname == "IMPORT_NAME" for instruction in dis.get_instructions(code)):
        return "an import"
    inner = (unseen_in(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return next((name for name in code.co_names if name in _UNSEEN), None) or next(filter(None, inner), None)


def words_in(code: types.CodeType) -> Iterator[str]:
    """Every string among the constants of code, and of inner functions."""
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from words_in(constant)
        elif isinstance(constant, (tuple, frozenset)):
            yield from (each for each in constant if isinstance(each, str))
