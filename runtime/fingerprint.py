"""Which model, on which machine: what a checkpoint is compared with before it is restored.

Bits depend on both. Another model is never right; another environment may be good enough, if the user says so.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from djinn_fx._version import __version__

if TYPE_CHECKING:
    from djinn_fx.runtime.engine import Engine

#: Words of 8 bytes that are hashed at a time. On the CPU they and what is made of them fit the cache, and one thread
#: does it; elsewhere it bounds the memory.
CPU_CHUNK, CHUNK = 1 << 15, 1 << 24

#: Configuration entries that say where a model came from, not what it computes. The dtype is compared by itself.
_HISTORY = frozenset({"transformers_version", "architectures", "dtype", "torch_dtype", "name_or_path"})

# SplitMix64 (Steele, Lea, Flood 2014): the increment, and the multipliers of its finalizer.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class Identity:
    """What makes a compiled model itself.

    Attributes:
        weights: every parameter and buffer by name, the model's own tensors.
        config: the model's configuration; values that JSON does not know are compared by their ``str``.
        model_type: e.g. ``"gpt2"``.
        build: what else decides bits, such as the backend and its kernel choices; part of the environment.
    """

    weights: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    model_type: str
    build: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A line per tensor, ``dtype[shape] hash``: equal for equal bits, on whatever device they lie."""
    sums = {name: _hash_bits(tensor) for name, tensor in weights.items()}
    return {
        name: f"{_short(weights[name].dtype)}{list(weights[name].shape)} {int(total) & _MASK:016x}"
        for name, total in sums.items()
    }


class Fingerprints:
    """The fingerprint of a model's weights, kept for as long as nothing tells that they changed; not thread-safe.

    Changes in place are told by the tensors' version counters. Those that leave no trace (``param.data``) are not, so
    whoever keeps this for long says :meth:`forget` now and then.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights
        self._known: dict[str, str] = {}
        self._versions: tuple[int, ...] | None = None

    @property
    def versions(self) -> tuple[int, ...] | None:
        """The version counters; None where tensors of inference mode have none."""
        tensors = self._weights.values()
        return None if any(tensor.is_inference() for tensor in tensors) else tuple(t._version for t in tensors)

    def forget(self) -> None:
        """The next question is answered from the weights themselves."""
        self._versions = None

    def lines(self) -> Mapping[str, str]:
        """As :func:`fingerprint`."""
        now = self.versions
        if now is None or now != self._versions:
            self._known = fingerprint(self._weights)
            self._versions = now
        return self._known

    def mark(self) -> object:
        """What the weights looked like when last looked at; equal marks: the same, as far as anything tells."""
        return self.versions, tuple(self._known.values())


def digest(lines: Mapping[str, str]) -> str:
    """One sha256 for all lines of :func:`fingerprint`, whatever their order."""
    text = "".join(f"{name}\0{line}\n" for name, line in sorted(lines.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit hash of a tensor's bits and their places, computed where it lies: int64 ``[]``.

    Words are mixed with their index and added modulo 2**64, so that the order of the addition does not matter.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    size = 8 * (CPU_CHUNK if flat.is_cpu else CHUNK)
    for start in range(0, flat.numel(), size):
        total += _mix(_words(flat[start : start + size]), start // 8).sum()
    return total


def _words(flat: torch.Tensor) -> torch.Tensor:
    """Bytes as int64 words, the last one filled up with zeros; a view where alignment allows it."""
    if flat.numel() % 8:
        return torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    return (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64)


def _mix(words: torch.Tensor, first: int) -> torch.Tensor:
    places = torch.arange(first + 1, first + 1 + words.numel(), device=words.device)
    mixed = places.mul_(_signed(_GOLDEN)).add_(words)
    mixed = (mixed ^ _shifted(mixed, 30)).mul_(_signed(_MIX_1))
    mixed = (mixed ^ _shifted(mixed, 27)).mul_(_signed(_MIX_2))
    return mixed ^ _shifted(mixed, 31)


def _shifted(words: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (words >> count).bitwise_and_((1 << (64 - count)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant


def describe_model(engine: Engine) -> dict[str, Any]:
    """Everything but the weights that must be equal: type, dtype, KV shapes and configuration, JSON-able."""
    return {
        "model_type": engine.identity.model_type,
        "dtype": _short(engine.dtype),
        "kv": [[k.shape[1], k.shape[3], v.shape[3]] for k, v in engine.arena.layers],
        "config": _plain(engine.identity.config),
    }


def describe_environment(engine: Engine) -> dict[str, Any]:
    """What decides the bits beside the model: device, versions, threads and compile options, JSON-able."""
    options = engine.options
    found: dict[str, Any] = {
        "device": device_name(engine.device),
        "djinn_fx": __version__,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "compiled sites": list(engine.compiled_names),
        "prefill_chunk": options.prefill_chunk,
        "edit_rank": options.edit_rank,
        "batch_invariant": options.batch_invariant,
        "max_sessions": options.max_sessions,
        "end of sequence": sorted(options.eos),
        "build": _plain(engine.identity.build),
    }
    if engine.device.type == "cpu":
        found["threads"] = torch.get_num_threads()
        found["CPU capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def model_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How two results of :func:`describe_model` differ, one phrase each."""
    configs = [{f"config.{k}": v for k, v in model["config"].items()} for model in (saved, here)]
    return _differences({**saved, "config": None, **configs[0]}, {**here, "config": None, **configs[1]})


def weight_differences(saved: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """How two results of :func:`fingerprint` differ: at most one phrase, naming the first tensor."""
    differing = [name for name in {**saved, **here} if saved.get(name) != here.get(name)]
    if not differing:
        return []
    marks = f"fingerprint {digest(saved)[:12]} in the checkpoint, {digest(here)[:12]} here"
    return [f"weights: {len(differing)} of {len(saved)} tensors differ, first {differing[0]!r} ({marks})"]


def environment_differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How two results of :func:`describe_environment` differ, as far as it decides bits; one phrase each."""
    saved, here = dict(saved), dict(here)
    if not (saved.get("batch_invariant") and here.get("batch_invariant")):
        # Only a batch-invariant model decodes in a program whose rows are the number of sessions.
        saved.pop("max_sessions", None)
        here.pop("max_sessions", None)
    then, now = saved.pop("compiled sites", []), here.pop("compiled sites", [])
    found = _differences(saved, here)
    for what, names in (
        ("not compiled here", [name for name in then if name not in now]),
        ("only compiled here", [name for name in now if name not in then]),
    ):
        if names:
            found.append(f"sites {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    return found


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {saved.get(key)!r} in the checkpoint, {here.get(key)!r} here"
        for key in {**saved, **here}
        if saved.get(key) != here.get(key)
    ]


def device_name(device: torch.device) -> str:
    """The name of the chip: libraries choose kernels by it, on the CPU too."""
    return _cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


@functools.cache
def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back, without a configuration's history; what JSON does not know as its ``str``."""
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items()}
        return {k: _plain(v) for k, v in kept.items() if not k.startswith("_") and k not in _HISTORY}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and value - value == 0):
        return value
    return str(value)
