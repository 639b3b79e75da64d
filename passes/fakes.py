"""Fake values as plain data: what shape, layout and storage they have, and fake tensors built from that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

Json = Any


class UnknownFake(Exception):
    """A fake value with properties that are not written down."""


class FakeWriter:
    """Numbers the fake tensors of a graph and the storages behind them."""

    def __init__(self) -> None:
        self._forms: list[Json] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._storages: dict[int, int] = {}
        self._sizes: list[int] = []

    def write(self, value: object) -> Json:
        """One node's value: a fake tensor by its number, lists of values, or a plain value.

        Raises:
            UnknownFake: it is something else, or a tensor that is more than shape, stride, dtype and device.
        """
        if value is None or type(value) in (bool, int, float):
            return {"is": value}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return [isinstance(value, tuple), *(self.write(each) for each in value)]
        if not isinstance(value, FakeTensor) or _is_special(value):
            raise UnknownFake(f"a value of type {type(value).__name__}")
        storage = value.untyped_storage()
        number = self._storages.setdefault(int(storage._cdata), len(self._sizes))
        if number == len(self._sizes):
            self._sizes.append(int(storage.nbytes()))
        dims = [*value.shape, *value.stride(), value.storage_offset(), self._sizes[number]]
        if any(type(dim) is not int for dim in dims):
            raise UnknownFake("a size that is not a number")
        form = (tuple(value.shape), value.stride(), int(value.storage_offset()), number)
        kind = (str(value.dtype).removeprefix("torch."), str(value.device), value.requires_grad)
        self._forms.append([*form, *kind])
        return len(self._forms) - 1

    def document(self) -> dict[str, Json]:
        """Everything that was written."""
        return {"forms": self._forms, "sizes": self._sizes}


class FakeReader:
    """Builds the fake tensors that a :class:`FakeWriter` wrote, all in one fake mode."""

    def __init__(self, document: Mapping[str, Json]) -> None:
        self._forms, self._sizes = document["forms"], document["sizes"]
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.mode = FakeTensorMode(shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True, export=True)

    def read(self, value: Json) -> Any:
        """The value that was written so."""
        if isinstance(value, dict):
            return value["is"]
        if isinstance(value, list):
            items = [self.read(each) for each in value[1:]]
            return tuple(items) if value[0] else items
        shape, stride, offset, number, dtype, device, requires_grad = self._forms[value]
        if number not in self._storages:
            memory = torch.empty(self._sizes[number], dtype=torch.uint8, device="meta")
            self._storages[number] = memory.untyped_storage()
        with torch.no_grad():
            meta = torch.empty(0, dtype=getattr(torch, dtype), device="meta")
            meta.set_(self._storages[number], offset, shape, stride)
        fake = FakeTensor(self.mode, meta, torch.device(device))
        return fake.requires_grad_() if requires_grad else fake


def _is_special(value: FakeTensor) -> bool:
    odd = value.layout is not torch.strided or value.is_conj() or value.is_neg() or value.is_quantized
    return odd or value.constant is not None or isinstance(value, torch.nn.Parameter)
