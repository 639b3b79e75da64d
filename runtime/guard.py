"""Watching the user's weights: in-place changes are seen, moved or replaced parameters are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch
from torch import nn

from djinn_fx.errors import CaptureError

#: Where a module keeps what it consists of.
_tables_of = itemgetter("_parameters", "_buffers", "_modules")

_dtype = attrgetter("dtype")


@dataclass(frozen=True)
class _Seen:
    tensor: torch.Tensor
    place: int
    form: tuple[object, ...]

    def unmoved(self) -> bool:
        """Whether the tensor lies where it lay, in the same form."""
        return self.tensor.data_ptr() == self.place and _form(self.tensor) == self.form


class WeightGuard:
    """Remembers where every parameter and buffer of a model lay when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = {name: _Seen(t, t.data_ptr(), _form(t)) for name, t in _tensors(model).items()}
        self._modules = tuple(vars(each) for each in model.modules())
        self._copies = [tuple(map(dict, tables)) for tables in self._tables()]
        self._tensors = tuple(seen.tensor for seen in self._seen.values())
        self._places, self._forms = self._places_now(), self._forms_now()
        # Copies of tables are compared: what is not the same object counts as the same if it says that it is equal.
        # Tensors of more than one element cannot say that.
        items = tuple(self._items())
        self._small = tuple(index for index, item in enumerate(items) if _small(item))
        self._kept = tuple(items[index] for index in self._small)

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers by name, the model's own."""
        return {name: seen.tensor for name, seen in self._seen.items()}

    def glance(self) -> None:
        """Raise if one of the tensors was moved; those that were replaced in the model are kept here, where they were.

        It takes a tenth of the time of :meth:`check`, and is enough for a CUDA graph to be safe and right in its bits:
        that reads memory by its address, and has read shapes, strides and dtypes for good.

        Raises:
            CaptureError: naming the first such parameter.
        """
        if self._places_now() != self._places:
            self.check()

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

        It is asked at every call, so nothing here is a loop of Python's own: that, or walking the names, takes
        several times as long.
        """
        try:
            same = list(self._tables()) == self._copies
        except Exception:  # tensors that are not the same object have no one answer
            return False
        if same and self._small:
            items = tuple(self._items())
            same = all(map(is_, map(items.__getitem__, self._small), self._kept))
        return same and self._places_now() == self._places and self._forms_now() == self._forms

    def _tables(self) -> Iterator[tuple[dict[str, object], ...]]:
        """The tables of each module, as they are now."""
        return map(_tables_of, self._modules)

    def _items(self) -> Iterator[object]:
        """All that modules hold, as it is now."""
        return chain.from_iterable(map(dict.values, chain.from_iterable(self._tables())))

    def _places_now(self) -> list[int]:
        """Where all tensors lie now."""
        return list(map(torch.Tensor.data_ptr, self._tensors))

    def _forms_now(self) -> tuple[list[object], ...]:
        """In what form all tensors are now."""
        return tuple(list(map(what, self._tensors)) for what in (_dtype, torch.Tensor.size, torch.Tensor.stride))


def _small(item: object) -> bool:
    """Whether ``==`` may take another for it: it is a tensor of one element, or has an equality of its own."""
    if isinstance(item, torch.Tensor):
        return item.numel() == 1
    return item is not None and type(item).__eq__ is not object.__eq__


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.size(), tensor.stride()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name it has: one that is tied has several."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
