"""Plain values: scalars, tensors by reference, positions and predicates as JSON-able data, no pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from djinn_fx.specs import Positions
from djinn_fx.when import CosineAbove, EntropyBelow, Nonfinite, NormAbove, Probe, Token

Plain = dict[str, Any]
Predicate = Callable[[torch.Tensor], torch.Tensor]

#: The predicates that can be written; a user's function cannot.
PREDICATES: Mapping[str, type] = {
    kind.__name__: kind for kind in (NormAbove, Probe, CosineAbove, Nonfinite, EntropyBelow, Token)
}


class Writer:
    """Writes values. What JSON cannot hold is put aside under names.

    Attributes:
        tensors: tensors by name.
        functions: users' predicates by name; they live in memory only.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.functions: dict[str, Predicate] = {}
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}

    def value(self, value: Any, own: bool = False) -> Any:
        """A scalar or a tensor; ``own`` copies a tensor that its owner may change."""
        if isinstance(value, torch.Tensor):
            return {"tensor": self._tensor(value, own)}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        number = float(value)
        return number if math.isfinite(number) else {"float": repr(number)}

    def fields(self, thing: Any, *, without: tuple[str, ...] = (), own: bool = False) -> Plain:
        """The fields of a dataclass, all of them scalars or tensors but for those left out."""
        names = [field.name for field in fields(thing) if field.name not in without]
        return {name: self.value(getattr(thing, name), own) for name in names}

    def predicate(self, when: Predicate) -> Plain:
        """A predicate; one that is not built in goes to :attr:`functions`."""
        name = type(when).__name__
        if PREDICATES.get(name) is type(when):
            return {"predicate": name, **self.fields(when, own=True)}
        key = f"function.{len(self.functions)}"
        self.functions[key] = when
        return {"function": key}

    def _tensor(self, tensor: torch.Tensor, own: bool) -> str:
        if id(tensor) not in self._seen:
            name = f"tensor.{len(self.tensors)}"
            self.tensors[name] = tensor.detach().clone() if own else tensor.detach()
            self._seen[id(tensor)] = (tensor, name)  # held, so that its id stays its own
        return self._seen[id(tensor)][1]


class Reader:
    """Reads what a :class:`Writer` wrote.

    Args:
        tensors: the writer's tensors, on any device.
        functions: the writer's functions; empty after a file.
        device: where tensors shall be.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], functions: Mapping[str, Predicate], device: torch.device
    ) -> None:
        self._tensors, self._functions, self._device = tensors, functions, device
        self._moved: dict[str, torch.Tensor] = {}

    def value(self, made: Any, own: bool = False) -> Any:
        """A scalar or a tensor; ``own`` makes a copy that its reader may change."""
        if not isinstance(made, dict):
            return made
        if "float" in made:
            return float(made["float"])
        name = made["tensor"]
        if own:
            return self._tensors[name].to(self._device, copy=True)
        if name not in self._moved:
            self._moved[name] = self._tensors[name].to(self._device)
        return self._moved[name]

    def values(self, made: Plain, *, without: tuple[str, ...] = (), own: bool = False) -> Plain:
        """A dataclass's fields, but for those left out."""
        return {name: self.value(value, own) for name, value in made.items() if name not in without}

    def predicate(self, made: Plain) -> Predicate:
        """A predicate."""
        if "function" in made:
            return self._functions[made["function"]]
        built: Predicate = PREDICATES[made["predicate"]](**self.values(made, without=("predicate",), own=True))
        return built


def write_positions(positions: Positions) -> Any:
    """A ``positions=`` argument as plain data."""
    if isinstance(positions, (str, int)):
        return positions
    if isinstance(positions, slice):
        return {"slice": [positions.start, positions.stop]}
    items = list(positions)
    return {"words" if items and isinstance(items[0], str) else "ints": items}


def read_positions(made: Any) -> Positions:
    """The inverse of :func:`write_positions`; a sequence comes back as a tuple."""
    if isinstance(made, (str, int)):
        return made
    if "slice" in made:
        return slice(*made["slice"])
    return tuple(made["words"] if "words" in made else made["ints"])
