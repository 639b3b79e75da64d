"""Bounds on the memory that an expression takes: each operation is sized before it is carried out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

#: Most elements of one result, and of all results of an expression together.
MAX_ELEMENTS, MAX_TOGETHER = 1 << 24, 1 << 26


class TooLarge(ValueError):
    """A result with more elements than are allowed."""


@dataclass(frozen=True)
class Sized:
    """A function that may need more memory than its arguments and its result show.

    Attributes:
        function: what is called.
        size: elements of the most that it makes, from its arguments.
    """

    function: Callable[..., Any]
    size: Callable[..., int]


@dataclass
class Budget:
    """How many elements results may have.

    Attributes:
        each: one result.
        left: all results from here on.
    """

    each: int = MAX_ELEMENTS
    left: int = MAX_TOGETHER

    def call(self, function: Callable[..., Any] | Sized, *args: Any, **options: Any) -> Any:
        """``function(*args, **options)``, unless its result is too large.

        Raises:
            TooLarge: it would be, or all results together are.
        """
        if isinstance(function, Sized):
            self._allow(function.size(*args, **options))
            function = function.function
        if math.prod(max(1, t.numel()) for t in _tensors((args, options))) > self.each:
            self._allow(_size_of(function, args, options))
        result = function(*args, **options)
        self.left -= sum(tensor.numel() for tensor in _tensors(result))
        if self.left < 0:
            raise TooLarge("the parts of this expression are too large together; index first, or print less at a time.")
        return result

    def index(self, base: torch.Tensor, index: Any) -> Any:
        """``base[index]``, unless that is too large."""
        parts = index if isinstance(index, tuple) else (index,)
        if math.prod(max(1, t.numel()) for t in _tensors((base, parts))) > self.each:
            places = tuple(place for part in parts for place in _places(part))
            self._allow(_size_of(_take, (base, places), {}))
        result = base[index]
        self.left -= result.numel()
        return result

    def _allow(self, size: int) -> None:
        if size > min(self.each, self.left):
            raise TooLarge(f"the result would have {size} elements; at most {min(self.each, self.left)} are allowed.")


def _take(base: torch.Tensor, index: Any) -> torch.Tensor:
    return base[index]


def _places(part: Any) -> Iterator[Any]:
    """A part of an index without bools: as many places as a mask could choose at most."""
    if isinstance(part, torch.Tensor) and part.dtype == torch.bool:
        for _ in range(part.dim()):
            yield torch.empty(part.numel(), dtype=torch.int64, device="meta")
    else:
        yield part


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _tensors(part)
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))


def _size_of(function: Callable[..., Any], args: Any, options: Any) -> int:
    """Elements of a result, found without computing it."""
    try:
        return sum(tensor.numel() for tensor in _tensors(function(*_hollow(args), **_hollow(options))))
    except NotImplementedError as error:
        raise TooLarge("it cannot be told how large the result would be; index first.") from error


def _hollow(thing: Any) -> Any:
    """The same with tensors that have no memory."""
    if isinstance(thing, torch.Tensor):
        return torch.empty(thing.shape, dtype=thing.dtype, device="meta")
    if isinstance(thing, (tuple, list)):
        return type(thing)(_hollow(part) for part in thing)
    return {name: _hollow(part) for name, part in thing.items()} if isinstance(thing, dict) else thing
