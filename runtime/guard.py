"""Watching the user's weights: in-place changes are seen, moved or replaced parameters are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from djinn_fx.errors import CaptureError

#: Where a module keeps what it consists of.
_TABLES = ("_parameters", "_buffers", "_modules")

_NOTHING = object()


@dataclass(frozen=True)
class _Seen:
    tensor: torch.Tensor
    place: int
    form: tuple[torch.dtype, torch.Size, tuple[int, ...]]

    def unmoved(self) -> bool:
        """Whether the tensor lies where it lay, in the same form."""
        return self.tensor.data_ptr() == self.place and _form(self.tensor) == self.form


class WeightGuard:
    """Remembers where every parameter and buffer of a model lay when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = {name: _Seen(t, t.data_ptr(), _form(t)) for name, t in _tensors(model).items()}
        self._all = tuple(self._seen.values())
        self._tables = tuple(
            (each, tuple((name, getattr(each, name), tuple(getattr(each, name).items())) for name in _TABLES))
            for each in model.modules()
        )

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers by name, the model's own."""
        return {name: seen.tensor for name, seen in self._seen.items()}

    def check(self) -> None:
        """Raise if a parameter was moved, replaced, added or removed since.

        Raises:
            CaptureError: naming the first such parameter.
        """
        if self._untouched():
            return
        now = _tensors(self._model)
        for name in self._seen.keys() | now.keys():
            seen, tensor = self._seen.get(name), now.get(name)
            if seen is None or tensor is not seen.tensor or not seen.unmoved():
                raise CaptureError(
                    f"parameter or buffer {name!r} was moved or replaced since djinn.compile. The compiled program "
                    "reads the old one, so it would run wrong: call djinn.compile again. (Changes in place, such as "
                    "load_state_dict or param.data.copy_, are fine.)"
                )

    def _untouched(self) -> bool:
        """Whether every module holds what it held.

        It is asked at every call: a look at each entry, since walking the names takes ten times as long.
        """
        for module, tables in self._tables:
            for attribute, table, items in tables:
                if getattr(module, attribute) is not table or len(table) != len(items):
                    return False
                if any(table.get(name, _NOTHING) is not value for name, value in items):
                    return False
        return all(seen.unmoved() for seen in self._all)


def _form(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name it has: one that is tied has several."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
