"""The public API: :func:`compile`."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from numbers import Integral, Real
from typing import Any, cast, overload

import torch
from torch import nn

from djinn_fx.dj import Dj
from djinn_fx.errors import CaptureError, InvalidValue
from djinn_fx.modules import DjModule, compile_module
from djinn_fx.passes.exports import ExportCache
from djinn_fx.passes.reference import reference
from djinn_fx.passes.source import prepare
from djinn_fx.passes.support import check
from djinn_fx.runtime.options import EngineOptions, Tokenizer
from djinn_fx.runtime.placement import place
from djinn_fx.runtime.streaming import Weights

#: Most host memory that checkpoints in memory and offloaded sessions may take.
PINNED_BYTES = 4 << 30

#: Seconds that a call waits at most for a row that another thread is using.
ROW_WAIT = 30.0

#: Positions per session where the user does not say.
MAX_LENGTH = 1024


@overload
def compile(
    model: nn.Module,
    *,
    example_inputs: None = None,
    tokenizer: Tokenizer | None = None,
    sites: str | Iterable[str] | None = None,
    max_sessions: int = 8,
    max_length: int = MAX_LENGTH,
    backend: str = "auto",
    prefill_chunk: int = 512,
    edit_rank: int = 4,
    batch_invariant: bool = False,
    pinned_bytes: int = PINNED_BYTES,
    disk_bytes: int = 0,
    spill_dir: str | os.PathLike[str] | None = None,
    row_wait: float = ROW_WAIT,
    verify: bool = True,
    device: torch.device | str | None = None,
    weights_bytes: int | None = None,
) -> Dj: ...


@overload
def compile(
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    sites: str | Iterable[str] | None = None,
    backend: str = "auto",
) -> DjModule: ...


def compile(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    tokenizer: Tokenizer | None = None,
    sites: str | Iterable[str] | None = None,
    max_sessions: int = 8,
    max_length: int = MAX_LENGTH,
    backend: str = "auto",
    prefill_chunk: int = 512,
    edit_rank: int = 4,
    batch_invariant: bool = False,
    pinned_bytes: int = PINNED_BYTES,
    disk_bytes: int = 0,
    spill_dir: str | os.PathLike[str] | None = None,
    row_wait: float = ROW_WAIT,
    verify: bool = True,
    device: torch.device | str | None = None,
    weights_bytes: int | None = None,
) -> Dj | DjModule:
    """Compile a model into a program that can be stopped at any layer.

    The model itself is left as it is: weights are shared, not copied, unless it shall run on another device or with
    less device memory than it needs.

    Args:
        model: a causal language model of transformers; or any module, together with ``example_inputs``.
        example_inputs: a plain module's arguments, a tuple or a mapping of keyword arguments.
        tokenizer: for prompts given as text.
        sites: where runs can stop and be steered; names, roles and globs. Default ``"resid_post"``, for plain modules
            the outputs of the children of each ModuleList or Sequential, else of the direct children.
        max_sessions: sessions whose KV fits on the device at a time.
        max_length: positions per session; never more than the model's own ``max_position_embeddings``.
        backend: ``"eager"`` runs the segments uncompiled; ``"inductor"`` compiles each structurally different segment
            once and, on CUDA, decodes through CUDA graphs; ``"auto"`` is ``"inductor"`` on CUDA, else ``"eager"``.
        prefill_chunk: prompt tokens per chunk.
        edit_rank: directions that one edit may have.
        batch_invariant: decode always in the program of ``max_sessions`` rows, so that a session's bits do not depend
            on who else is there.
        pinned_bytes: most host memory that checkpoints in memory and sessions off the device may take. On CUDA, values
            that ``run_with_cache(device="cpu")`` brings may take half as much beside it.
        disk_bytes: most bytes of files that sessions go to when that is full; 0: none.
        spill_dir: folder for those files; None: the system's folder for temporary files.
        row_wait: seconds that a call waits at most for a KV row that another thread is using; then CapacityError.
        verify: compare the captured model with the eager one before returning.
        device: where to run a language model that lies on the CPU: its weights are copied there. Default: where it is.
        weights_bytes: most device memory that the weights may take. Layers that do not fit lie in host memory (pinned,
            for CUDA) and stream in ahead of their turn, in every step. Default: all of them are on the device.

    Returns:
        :class:`Dj` for a language model, :class:`djinn_fx.modules.DjModule` for a plain module.

    Raises:
        CaptureError: the model cannot be captured; the message says why.
        CaptureMismatch: it was captured, but its numbers differ from eager's beyond tolerance.
        CapacityError: ``weights_bytes`` is less than the least that works; the message names it.
        InvalidValue, UnknownSite: an argument is off.
    """
    if backend not in ("auto", "eager", "inductor"):
        raise InvalidValue(f"backend={backend!r}: choose 'auto', 'eager' or 'inductor'.")
    given, words = cast("Any", model), cast("Any", tokenizer)
    if not isinstance(given, nn.Module):
        raise CaptureError(f"cannot compile {given!r}: {'; '.join(check(given).reasons)}.")
    if words is not None and not callable(words):
        raise InvalidValue(f"tokenizer={words!r}: give the tokenizer itself, AutoTokenizer.from_pretrained(...).")
    if example_inputs is not None:
        if device is not None or weights_bytes is not None:
            raise InvalidValue("device= and weights_bytes= are for language models, not for example_inputs.")
        return compile_module(model, example_inputs, sites)
    counts: dict[str, Any] = {
        "max_sessions": max_sessions,
        "max_length": max_length,
        "prefill_chunk": prefill_chunk,
        "edit_rank": edit_rank,
    }
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise InvalidValue(f"{name}={value!r}: give 1 or more.")
    seconds: Any = row_wait
    if not isinstance(seconds, Real) or not 0 <= row_wait <= threading.TIMEOUT_MAX:
        raise InvalidValue(f"row_wait={row_wait!r}: give seconds, 0 or more.")
    pinned_bytes, disk_bytes = _bytes("pinned_bytes", pinned_bytes), _bytes("disk_bytes", disk_bytes)
    weights_bytes = None if weights_bytes is None else _bytes("weights_bytes", weights_bytes, 1)
    weights = _weights_of(model, device, weights_bytes)
    stand_in = None if weights is None else weights.stand_in
    source = prepare(model, stand_in=stand_in)
    limit = _positions_of(model)
    if max_length > limit:
        if max_length != MAX_LENGTH:
            warnings.warn(
                f"max_length={max_length} is more than the {limit} positions this model knows; compiled for {limit}.",
                stacklevel=2,
            )
        max_length = limit
    if backend == "auto":
        backend = "inductor" if source.device.type == "cuda" else "eager"
    options = EngineOptions(
        max_sessions=max_sessions,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        edit_rank=edit_rank,
        batch_invariant=batch_invariant,
        eos=_eos_of(model),
        vocab_size=source.vocab_size or 0,
        pinned_bytes=pinned_bytes,
        disk_bytes=disk_bytes,
        row_wait=row_wait,
        spill_dir=None if spill_dir is None else os.fspath(spill_dir),
        chunk_step=4 if backend == "inductor" else 2,  # each size is a compilation
        static=backend == "inductor",
    )
    chosen = ("resid_post",) if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    # Kernels of Triton go to whichever GPU is current, and may be compiled and timed before the engine's lock exists.
    with torch.cuda.device(source.device) if source.device.type == "cuda" else nullcontext():
        dj = Dj(model, source, options, chosen, tokenizer, backend, ExportCache.from_environment(), weights)
        if verify:
            around = None if weights is None else weights.around
            dj.verify(partial(reference, model, stand_in=stand_in, around=around))
    return dj


def _bytes(name: str, value: Any, least: int = 0) -> int:
    """A budget as a whole number; people write ``6e9`` too."""
    known = isinstance(value, Real)
    if not known or not least <= value < 1 << 63:
        raise InvalidValue(f"{name}={value!r}: give a number of bytes, {least} or more.")
    return int(value)


def _weights_of(model: nn.Module, device: torch.device | str | None, budget: int | None) -> Weights | None:
    """Copies of the weights for programs to read; None where they read the model's own."""
    here = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        there = here if device is None else torch.device(device)
    except RuntimeError as error:
        raise InvalidValue(f"device={device!r}: give 'cuda', 'cuda:0' or 'cpu'.") from error
    if there.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValue(f"device={str(there)!r}: torch finds no CUDA device here.")
    if there.type == "cuda" and there.index is None:
        there = torch.device("cuda", torch.cuda.current_device())
    if budget is None and there == here:
        return None
    support = check(model)
    if not support.ok:
        return None  # prepare says why
    if here.type != "cpu":
        raise InvalidValue(
            f"the model lies on {here}: device= and weights_bytes= are for a model on the CPU, whose weights are "
            "brought to the device. Leave them out, or load the model without .to(...) and say device='cuda'."
        )
    return Weights(model, place(model, budget), there)


def _positions_of(model: nn.Module) -> int:
    """How many positions the model knows; a very large number where it does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(text, "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else 1 << 30


def _eos_of(model: nn.Module) -> frozenset[int]:
    """The EOS tokens of the model's generation_config."""
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else [int(token) for token in eos])


__all__ = ["Dj", "DjModule", "check", "compile"]
