"""Which weights stay on the device and which stream through it, so that a model fits a budget of device memory.

Matrices of the layers may stream; everything else (embedding, head, norms, biases, buffers) stays. Layers that stream
are spread evenly over the model: while those that stay compute, the copies of those that stream go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from djinn_fx.errors import CapacityError, InvalidValue

#: Layers that stream share so much room: one is read while the next arrives.
SLOTS = 2

#: Weights begin at multiples of this within their layer.
ALIGNMENT = 256


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of a layer that may stream, and how they lie in one stretch of memory.

    Attributes:
        path: of the module.
        tensors: the model's own.
        offsets: where each begins.
        nbytes: bytes of the stretch.
    """

    path: str
    tensors: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    nbytes: int

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The weights' places in a stretch of bytes."""
        return [
            memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(self.tensors, self.offsets, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Placement:
    """What of a model stays and what streams.

    Attributes:
        layers: all layers, in order.
        streamed: indices of those that stream, in order; the others stay.
        base: bytes of what never streams.
    """

    layers: tuple[Layer, ...]
    streamed: tuple[int, ...]
    base: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of the room for one layer that streams."""
        return max((self.layers[index].nbytes for index in self.streamed), default=0)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device."""
        chosen = set(self.streamed)
        kept = sum(layer.nbytes for index, layer in enumerate(self.layers) if index not in chosen)
        return self.base + kept + SLOTS * self.slot_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes that stream in each step, and that lie on the host."""
        return sum(self.layers[index].nbytes for index in self.streamed)


def place(model: nn.Module, budget: int | None) -> Placement:
    """Let as many layers stay as a budget allows; None: all.

    Args:
        model: a language model of transformers, its weights where the user has them.
        budget: bytes on the device.

    Raises:
        CapacityError: less than the least that works; names it.
        InvalidValue: a budget that is no number of bytes, or a model without a list of layers.
    """
    if budget is not None and budget < 1:
        raise InvalidValue(f"weights_bytes={budget}: give a number of bytes.")
    layers = _layers(model)
    movable = {id(tensor) for layer in layers for tensor in layer.tensors}
    every = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    base = sum(tensor.nbytes for key, tensor in every.items() if key not in movable)
    for stay in range(len(layers), -1, -1):
        streamed = evenly(len(layers) - stay, len(layers))
        if 0 < len(streamed) <= SLOTS:
            continue  # they would take the room that they have anyway
        found = Placement(layers, streamed, base)
        if budget is None or found.device_bytes <= budget:
            return found
    if not layers:
        raise InvalidValue(
            f"weights_bytes={budget}: {type(model).__name__} has no list of num_hidden_layers modules whose weights "
            "could stream. Leave weights_bytes out."
        )
    raise CapacityError(
        f"weights_bytes={budget} is too little: {found.device_bytes} bytes are the least, of which {base} are weights "
        f"that do not stream (embedding, head, norms) and the rest room for {SLOTS} layers at a time."
    )


def evenly(count: int, total: int) -> tuple[int, ...]:
    """``count`` of ``total`` indices, spread evenly, the first among them."""
    return tuple(index * total // count for index in range(count))


def _layers(model: nn.Module) -> tuple[Layer, ...]:
    """The layers with those of their tensors that may stream: matrices that nobody else has."""
    holders: dict[int, set[str]] = {}
    paths = _paths(model)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        owner = next((path for path in paths if name.startswith(f"{path}.")), "")
        holders.setdefault(id(tensor), set()).add(owner)
    return tuple(_layer(path, model.get_submodule(path), holders) for path in paths)


def _layer(path: str, module: nn.Module, holders: dict[int, set[str]]) -> Layer:
    found: list[torch.Tensor] = []
    offsets: list[int] = []
    end = 0
    for tensor in module.parameters():
        if tensor.dim() > 1 and tensor.is_contiguous() and holders[id(tensor)] == {path}:
            found.append(tensor)
            offsets.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return Layer(path, tuple(found), tuple(offsets), end)


def _paths(model: nn.Module) -> list[str]:
    """Paths of the layers: of the largest list that has as many as the configuration says."""
    config: Any = getattr(model, "config", None)
    count = config.get_text_config().num_hidden_layers if config is not None else 0
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        return []
    name, module = max(lists, key=lambda each: sum(p.nbytes for p in each[1].parameters()))
    return [f"{name}.{index}" for index in range(len(module))]


def leaves(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, each once."""
    yield from {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
