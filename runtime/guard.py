"""Watching the user's weights: in-place changes are seen, moved or replaced parameters are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from djinn_fx.errors import CaptureError


@dataclass(frozen=True)
class _Seen:
    tensor: torch.Tensor
    place: int
    dtype: torch.dtype


class WeightGuard:
    """Remembers where every parameter and buffer of a model lay when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = {name: _Seen(t, t.data_ptr(), t.dtype) for name, t in _tensors(model).items()}
        tables = [table for each in model.modules() for table in (each._parameters, each._buffers, each._modules)]
        self._all = tuple(self._seen.values())
        self._tables = tuple((table, tuple(table.items())) for table in tables)

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
            if (
                seen is None
                or tensor is not seen.tensor
                or tensor.data_ptr() != seen.place
                or tensor.dtype != seen.dtype
            ):
                raise CaptureError(
                    f"parameter or buffer {name!r} was moved or replaced since djinn.compile. The compiled program "
                    "reads the old one, so it would run wrong: call djinn.compile again. (Changes in place, such as "
                    "load_state_dict or param.data.copy_, are fine.)"
                )

    def _untouched(self) -> bool:
        """Whether every module holds what it held.

        It is asked at every call: a look at each entry, since walking the names takes ten times as long.
        """
        for table, items in self._tables:
            if len(table) != len(items) or any(table.get(name) is not value for name, value in items):
                return False
        return all(seen.tensor.data_ptr() == seen.place and seen.tensor.dtype is seen.dtype for seen in self._all)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
